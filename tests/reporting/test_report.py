"""The report: which files it writes and what it says."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from prunekit.errors import CheckpointError, RunFolderError
from prunekit.reporting import report

ABOUT_A_RUN = [
    "counters.csv", "counters.md", "layers.csv", "layers.md",
    "channels.png", "channels.svg", "params_macs.png", "params_macs.svg",
]  # fmt: skip
UNITS = ("block",)


@pytest.fixture
def quick_figures(monkeypatch):
    """Figures as empty files: drawing is what takes the time, and tests of names do not look at them."""

    def touch(_, stem):
        paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
        for path in paths:
            path.touch()
        return paths

    monkeypatch.setitem(report.__globals__, "write_figure", touch)


@pytest.fixture
def console():
    return Console(width=80, file=io.StringIO(), color_system=None)


def test_one_run_lies_flat_in_its_own_folder(make_run, console):
    path = make_run(units=UNITS)
    written = report([path], None, console)
    assert [p.name for p in written] == ["summary.csv", "summary.md", *ABOUT_A_RUN]
    assert set((path / "report").iterdir()) == set(written)
    text = console.file.getvalue()
    assert all(str(p) in text for p in written) and "complete" in text and "finetuned" in text
    assert max(map(len, text.split("written:")[0].splitlines())) <= 80


def test_several_runs_lie_in_the_folder_report(make_run, console, tmp_path, monkeypatch, quick_figures):
    paths = [make_run("a", units=UNITS), make_run("b", seed=1, units=UNITS)]
    monkeypatch.chdir(tmp_path)
    written = report(paths, None, console)
    assert {p.as_posix() for p in written} == {
        *(f"report/{n}" for n in ("summary.csv", "summary.md", "totals.png", "totals.svg")),
        *(f"report/{run}-{n}" for run in "ab" for n in ABOUT_A_RUN),
    }


def test_runs_of_the_same_name_keep_their_files_apart(make_run, console, tmp_path, quick_figures):
    names = ["x/run", "y/run", "z/y/run", "x-run", "RUN"]
    paths = [make_run(name, seed=i, units=UNITS) for i, name in enumerate(names)]
    written = report(paths, tmp_path / "out", console)
    assert len({str(p).casefold() for p in written}) == len(written) == 4 + 8 * len(paths)
    layers = [(tmp_path / "out" / p.name).read_bytes() for p in written if p.name.endswith("layers.csv")]
    assert len(set(layers)) == len(paths)


def test_the_same_run_twice_counts_once(make_run, console, tmp_path, quick_figures):
    path = make_run(units=UNITS)
    written = report([path, path / "." / "..", path][::2], tmp_path / "out", console)
    assert "totals.png" not in {p.name for p in written}


@pytest.mark.parametrize("stop", ["train", "extract", "slim", "finetune"])
def test_an_incomplete_run_is_reported_and_what_is_missing_said(make_run, console, stop, quick_figures):
    path = make_run(units=UNITS, stop=stop)
    written = report([path], None, console)
    text = console.file.getvalue()
    assert "interrupted" in text
    assert ("layers.json" in text) == (stop != "finetune")
    assert len(written) == (10 if stop == "finetune" else 2)
    assert ("no model has been measured" in text) == (stop == "train")


def test_a_damaged_file_is_said(make_run, console):
    path = make_run(units=UNITS)
    (path / "layers.json").write_text("{}")
    assert len(report([path], None, console)) == 2
    assert "layers.json" in console.file.getvalue() and "--from slim" in console.file.getvalue()


def test_no_run_folder(tmp_path, console):
    for paths in ([], [tmp_path]):
        with pytest.raises(RunFolderError):
            report(paths, None, console)
    assert list(tmp_path.iterdir()) == []


def test_names_are_no_markup(make_run, console, tmp_path, quick_figures):
    paths = [make_run("[red]a", units=UNITS), make_run("[bold]b", seed=1, units=UNITS)]
    report(paths, tmp_path / "out", console)
    assert "[red]a" in console.file.getvalue() and "[bold]b" in console.file.getvalue()


def test_a_file_that_cannot_be_written_leaves_the_old_one(make_run, console, monkeypatch):
    path = make_run(units=UNITS)
    report([path], None, console)
    before = {p.name: p.read_bytes() for p in (path / "report").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        report([path], None, console)
    assert {p.name: p.read_bytes() for p in (path / "report").iterdir()} == before


def test_nothing_of_torch_or_pyplot_is_needed():
    code = "import sys, prunekit.reporting; assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_published_models_alone_are_printed_and_written_only_where_asked(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report([], None, console, published=True) == [] and list(tmp_path.iterdir()) == []
    text = console.file.getvalue()
    assert "ECSSD" in text and "CSNet-L ×1" in text and "0.898" in text and "no model has been" not in text
    written = report([], "out", console, published=True)
    assert [p.name for p in written] == ["summary.csv", "summary.md"]
    assert '"published, ECSSD",CSNet-L ×2,140894,718394292,0.9156' in written[0].read_text()


def test_published_models_go_into_the_files_of_a_run(make_run, console):
    for stop in (None, "train"):
        path = make_run(str(stop), units=UNITS, stop=stop)
        report([path], None, console, published=True)
        assert "CSNet-L ×1" in (path / "report" / "summary.md").read_text()
        report([path], None, console)
        assert "CSNet-L ×1" not in (path / "report" / "summary.md").read_text()
    assert "no model has been measured yet" in console.file.getvalue()
