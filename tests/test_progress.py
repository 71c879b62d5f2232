"""What a run tells while it goes on fits a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from prunekit.progress import Reporter

LINE = {
    "stage": "finetune",
    "epoch": 300,
    "loss": 0.73421,
    "penalty": 2240.0,
    "alive": 1235,
    "of": 1235,
    "metrics": {"mae": 0.48531, "max_f": 0.37411},
    "seconds": 27.4,
}


@pytest.fixture
def told():
    out = io.StringIO()
    return Reporter(Console(file=out, width=80)), out


def test_a_plain_line_an_epoch(told, tmp_path):
    reporter, out = told
    reporter.log = tmp_path / "run.log"
    reporter.start("finetune", 10, 0)
    reporter.step(5, 0.5, 0.1, 3, 4)
    reporter.epoch(LINE)
    reporter.stop()
    text = out.getvalue()
    assert text == "finetune 300 loss 0.734 pen 2.2e+03 alive 1235/1235 mae 0.485 max_f 0.374 27 s\n"
    assert len(text) <= 81
    assert (tmp_path / "run.log").read_text().endswith(f"  {text}")


def test_a_bar_in_a_terminal():
    out = io.StringIO()
    reporter = Reporter(Console(file=out, width=80, force_terminal=True))
    reporter.start("train", 640, 0)
    reporter.step(320, 0.123, 1230.0, 1235, 1235)
    reporter.stop()
    assert "320/640" in out.getvalue() and "loss 0.123 pen 1.2e+03 alive 1235" in out.getvalue()


def test_text_from_files_is_no_markup(told):
    reporter, out = told
    reporter.say("[red]x[/red] [/] {0}")
    assert out.getvalue() == "[red]x[/red] [/] {0}\n"
