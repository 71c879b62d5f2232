import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prunekit.utils import progress
from prunekit.utils.progress import (
    ASCII_BLOCKS,
    BLOCKS,
    Reporter,
    TrainingStatus,
    format_duration,
    format_epoch,
    sparkline,
    training_epochs,
)

LINE = {
    "stage": "train",
    "epoch": 299,
    "loss": 0.73421,
    "penalty": 2240.0,
    "lambda": 12.5,
    "alive": 1235,
    "of": 1235,
    "metrics": {"mae": 0.48531, "max_f": 0.37411},
    "seconds": 27.4,
}
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Screen(io.TextIOWrapper):
    """A text file whose content can be read back."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)

    def lines(self):
        """Return the lines without control sequences."""
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.text()).replace("\r", "").split("\n")


def terminal(width=80, encoding="utf-8"):
    screen = Screen(encoding)
    return Console(file=screen, width=width, force_terminal=True, color_system=None), screen


@pytest.fixture
def plain():
    out = io.StringIO()
    return Reporter(Console(file=out, width=80)), out


@pytest.fixture
def now(monkeypatch):
    """A clock that tests set."""
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    return clock


@given(st.lists(st.floats(-1e9, 1e9), max_size=80), st.integers(1, 40), st.booleans())
def test_sparkline_has_width_and_extremes(values, width, ascii_only):
    drawn, blocks = sparkline(values, width, ascii_only), ASCII_BLOCKS if ascii_only else BLOCKS
    assert len(drawn) == min(len(values), width) and set(drawn) <= set(blocks)
    assert not ascii_only or drawn.isascii()
    if values and len(values) <= width and max(values) > min(values):
        assert drawn[values.index(min(values))] == blocks[0] and drawn[values.index(max(values))] == blocks[-1]
        heights = [blocks.index(block) for block in drawn]
        assert all(a <= b for (_, a), (_, b) in itertools.pairwise(sorted(zip(values, heights, strict=True))))


def test_sparkline():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == BLOCKS and sparkline(range(800), 8) == BLOCKS
    assert sparkline([5, 5]) == "▁▁" and sparkline([]) == "" and sparkline([float("nan"), 1, float("inf"), 2]) == "▁█"


def test_format_duration():
    assert [format_duration(s) for s in (-1, 0, 59.6, 3599, 3600, 200_000)] == [
        "0:00", "0:00", "1:00", "59:59", "1:00:00", "2 d 7:33:20"
    ]  # fmt: skip


def test_training_epochs():
    assert training_epochs(30, 8) == {"train": 30, "finetune": 8}
    assert list(training_epochs(30, 8, rounds=3).items()) == [
        ("train", 30),
        ("step1", 8),
        ("step2", 8),
        ("finetune", 8),
    ]


def test_one_line_per_epoch_without_a_terminal(plain, tmp_path):
    reporter, out = plain
    reporter.log_file = tmp_path / "run.log"
    with reporter.stage("train"):
        reporter.start_training("train", 300, 10, 298)
        reporter.log_step(2985, 0.5, 0.1, 12.5, 3, 4)
        reporter.log_epoch(LINE)
        reporter.end_training()
    text = out.getvalue()
    assert text == "train 299/300 loss 0.734 pen 2.24k alive 1235/1235 mae 0.485 max_f 0.374 27 s\n"
    assert len(text) <= 81
    assert (tmp_path / "run.log").read_text().endswith(f"  {text}")


def test_format_epoch_with_and_without_decay():
    assert format_epoch(LINE, 300) == "train 299/300 loss 0.734 pen 2.24k alive 1235/1235 mae 0.485 max_f 0.374 27 s"
    line = {**LINE, "stage": "finetune", "epoch": 2, "penalty": 0.0, "seconds": 0.42}
    assert format_epoch(line, 12) == "finetune  2/12 loss 0.734 alive 1235/1235 mae 0.485 max_f 0.374 0.4 s"
    assert format_epoch({**line, "seconds": 754}).endswith(" 12:34")
    # Changing numbers are aligned.
    assert "pen   0.2 alive    7/1235 mae" in format_epoch({**LINE, "penalty": 0.2, "alive": 7})


def test_messages_are_not_markup(plain):
    reporter, out = plain
    reporter.info("[red]x[/red] [/] {0}")
    assert out.getvalue() == "[red]x[/red] [/] {0}\n"


def test_stage_reports_duration_and_logs_errors(plain, tmp_path, now):
    reporter, out = plain
    reporter.log_file, reporter.training_epochs = tmp_path / "run.log", training_epochs(2, 1)
    with reporter.stage("train"):
        now["now"] += 151
    with reporter.stage("extract"):
        pass
    assert out.getvalue() == "train: done in 2:31\n"
    for error, message in ((ValueError("no\nluck"), "failed: no luck"), (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(type(error)), reporter.stage("slim"):
            raise error
        assert reporter.log_file.read_text().endswith(f"  slim: {message}\n")
    assert "slim" not in out.getvalue(), "the command reports it"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [200, 80, 40, 20])
def test_display_fits_the_terminal(width, encoding):
    console, screen = terminal(width, encoding)
    histories = {"mae": [1, 2]}
    for share, left, run_left in itertools.product((0.0, 0.999, 1.0), (None, 9e6), (None, 3.0)):
        console.print(TrainingStatus("finetune", 299, 300, share, left, run_left, [3.0, 2.0, 1.0] * 9, LINE, histories))
    console.print(TrainingStatus("train", 1, 9))
    assert max(map(len, screen.lines())) <= width
    assert encoding == "utf-8" or screen.text().isascii()


def test_display_in_80_and_40_columns():
    status = TrainingStatus("train", 4, 9, 0.5, 42, 131, [8.0, 4.0, 1.0], LINE)
    console, screen = terminal(80)
    console.print(status)
    assert [line.rstrip() for line in screen.lines()] == [
        "train epoch 4/9 ━━━━━━━━━━━━━━━━━━━━──────────────────── 0:42 left",
        "loss 0.734 █▄▁  penalty 2.24k  λ 12.5  alive 1235/1235  run ~2:11 left",
        "",
    ]
    console, screen = terminal(40, "ascii")
    console.print(status)
    assert [line.rstrip() for line in screen.lines()] == [
        "train epoch 4/9 #######....... 0:42 left",
        "loss 0.734 #~_  penalty 2.24k",
        "lambda 12.5  alive 1235/1235",
        "run ~2:11 left",
        "",
    ]


def test_time_left(now):
    console, screen = terminal()
    reporter = Reporter(console)
    reporter.training_epochs = training_epochs(4, 3)
    reporter.start_training("train", 4, 10, 1, [2.0])
    view = reporter._training
    assert view.status().seconds_left is None and view.status().epoch == 2
    now["now"] += 20
    reporter.log_step(20, 1.5, 0.0, 5.0, 8, 9)
    shown = view.status()
    # 10 of 30 steps took 20 s; fine-tuning has 30 more.
    assert (shown.seconds_left, shown.run_seconds_left, shown.progress, shown.epoch) == (40, 100, 0.5, 2)
    assert shown.losses == [2.0, 1.5] and (shown.line["alive"], shown.line["lambda"]) == (8, 5.0)
    now["now"] += 5
    assert view.status().seconds_left == 35, "counts down between steps"
    reporter.log_epoch({**LINE, "epoch": 2, "loss": 1.6})
    assert view.status().losses == [2.0, 1.6] and "train 2/4 loss 1.600" in screen.text()
    reporter.log_step(21, 1.5, 0.0, 5.0, 8, 9)
    assert view.status().epoch == 3
    reporter.end_training()
    reporter.start_training("finetune", 3, 10, 0)
    now["now"] += 1
    reporter.log_step(10, 1.5, 0.0, 0.0, 8, 9)
    assert reporter._training.status().run_seconds_left is None, "finetune is the last training"
    reporter.end_training()


def test_time_left_where_epochs_take_different_times(now):
    reporter = Reporter(terminal()[0])
    reporter.training_epochs = training_epochs(4, 3)
    reporter.start_training("train", 4, 10, 1, costs=[1, 1, 4, 4])
    now["now"] += 10
    reporter.log_step(20, 1.5, 0.0, 5.0, 8, 9)
    # An epoch of cost 1 took 10 s, and those left cost 8; fine-tuning has 3 of the mean, 2.5.
    shown = reporter._training.status()
    assert (shown.seconds_left, shown.run_seconds_left, shown.epoch) == (80, 155, 2)
    now["now"] += 20
    reporter.log_step(25, 1.5, 0.0, 5.0, 8, 9)
    assert reporter._training.status().seconds_left == 60 and reporter._training.status().epoch == 3
    reporter.log_step(40, 1.5, 0.0, 5.0, 8, 9)
    assert reporter._training.status().seconds_left == 0
    reporter.end_training()


def test_first_epoch_shows_step_losses(now):
    reporter = Reporter(terminal()[0])
    reporter.start_training("train", 2, 10, 0)
    for step, loss in enumerate((3.0, 2.0, 1.0), 1):
        reporter.log_step(step, loss, 0.0, 0.0, 1, 1)
    assert reporter._training.status().losses == [3.0, 2.0, 1.0]
    reporter.end_training()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_terminal_is_restored(error):
    console, screen = terminal(40)
    reporter = Reporter(console)
    try:
        with reporter.stage("train"):
            reporter.start_training("train", 2, 5, 0)
            try:
                reporter.log_step(5, 1.0, 3.0, 5.0, 8, 9)
                assert screen.text().count(HIDE) == 1 and SHOW not in screen.text()
                reporter.log_epoch({**LINE, "epoch": 1})
                if error:
                    raise error
            finally:
                reporter.end_training()
    except (KeyboardInterrupt, ValueError):
        pass
    assert screen.text().count(HIDE) == screen.text().count(SHOW) == 1
    assert reporter._live is None and not reporter._views
    assert console.file.text().rstrip("\r").endswith("\x1b[2K"), "the display is erased"


def test_spinner(now):
    console, screen = terminal()
    reporter = Reporter(console)
    with reporter.stage("slim"), reporter.spinner("reading data"):
        now["now"] += 75
        reporter._live.refresh()
        assert "reading data 1:15" in screen.text(), "only the innermost view is shown"
        assert "slim" not in screen.text().rpartition("reading")[2]
    console, screen = terminal(80, "ascii")
    reporter = Reporter(console)
    with reporter.stage("export"):
        reporter._live.refresh()
    assert screen.text().isascii() and "export 0:00" in screen.text()


def test_progress_bar(now):
    console, screen = terminal()
    reporter = Reporter(console)
    with reporter.stage("evaluate"):
        bar = reporter.progress_bar("[/]{x}")
        now["now"] += 10
        bar(1, 4)
        reporter._live.refresh()
        bar.close()
    assert re.search(r"\[/\]\{x\} 1/4 ━{10}─{30} 0:30 left", screen.text())
    assert reporter._live is None


def test_no_display_without_a_terminal(plain, monkeypatch):
    reporter, out = plain
    with reporter.stage("train"):
        reporter.start_training("train", 2, 5, 0)
        reporter.log_step(5, 1.0, 3.0, 5.0, 8, 9)
        reporter.end_training()
        reporter.progress_bar("x")(1, 2)
        assert reporter._live is None
    assert out.getvalue() == ""
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    with Reporter(Console(file=screen, force_terminal=True)).stage("train"):
        pass
    assert screen.text() == ""
