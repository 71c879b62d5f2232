"""Files and terminal output of a report."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from urllib.parse import unquote

import pytest
from helpers.fake_run import without_checksum
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from prunekit.cli import main
from prunekit.errors import CheckpointError, PrunekitError, RunFolderError
from prunekit.reporting import report
from prunekit.reporting.figures import ReportFigure
from prunekit.reporting.figures.style import FigureSize

KINDS = ("csv", "json", "md", "tex")
UNITS = ("block",)


def files(*stems, kinds=KINDS):
    return [f"{stem}.{kind}" for stem in stems for kind in kinds]


COMMON = files("summary", "seconds", "notes")
ABOUT_A_RUN = [*files("counters", "layers"), "epochs.csv", *files("dot", kinds=("png", "svg"))]


@pytest.fixture
def quick_figures(monkeypatch):
    """Draw one small figure per run, to save time."""

    def figures(runs, *_):
        for run in runs:
            owner = run.name if len(runs) > 1 else ""
            yield ReportFigure("dot", "Dot", "Nothing to see.", Figure(figsize=(0.5, 0.5)), owner)

    monkeypatch.setitem(report.__globals__, "report_figures", figures)


@pytest.fixture
def few_figures(monkeypatch):
    """Draw bars, lines and pictures, to save time."""
    figures = report.__globals__["report_figures"]

    def few(*args):
        return (figure for figure in figures(*args) if figure.name in ("channels", "training", "gallery"))

    monkeypatch.setitem(report.__globals__, "report_figures", few)


@pytest.fixture
def console():
    return Console(width=80, file=io.StringIO(), color_system=None)


def test_report_of_one_run_is_written_to_its_folder(make_run, console):
    path = make_run(units=UNITS, measured_too=True)
    written = report([path], None, console)
    names = {p.name for p in written}
    assert names >= {
        *COMMON,
        *files("bench", "evals", "counters", "layers"),
        "epochs.csv",
        "index.html",
        "channels.svg",
    }
    assert {p.suffix for p in written} == {".csv", ".json", ".md", ".tex", ".png", ".svg", ".html"}
    assert set((path / "report").iterdir()) == set(written)
    text = console.file.getvalue()
    table, _, listed = text.partition("written to")
    assert "complete" in text and "finetuned" in text and "equivalence check: passed" in text and "thop +" in text
    assert "latency:" in text and "PASCAL-S" in text and "note: " in text and "train 1.5 s" in text
    assert max(map(len, table.splitlines())) <= 80
    for name in names:
        assert name.rpartition(".")[0] in listed and f".{name.rpartition('.')[2]}" in listed
    page = (path / "report" / "index.html").read_text()
    assert "<svg" in page and "210,985" not in page and "MACs" in page


def test_report_of_several_runs_is_written_to_report_folder(make_run, console, tmp_path, monkeypatch, quick_figures):
    paths = [make_run("a", units=UNITS), make_run("b", seed=1, units=UNITS)]
    monkeypatch.chdir(tmp_path)
    written = report(paths, None, console)
    assert {p.as_posix() for p in written} == {
        *(f"report/{n}" for n in [*COMMON, "index.html"]),
        *(f"report/{run}-{n}" for run in "ab" for n in ABOUT_A_RUN),
    }
    assert "a (complete)" in console.file.getvalue() and "b (complete)" in console.file.getvalue()


def test_runs_with_equal_names_get_distinct_files(make_run, console, tmp_path, quick_figures):
    names = ["x/run", "y/run", "z/y/run", "X-run", "RUN"]
    paths = [make_run(name, seed=i, units=UNITS) for i, name in enumerate(names)]
    written = report(paths, tmp_path / "out", console)
    one_run = len(ABOUT_A_RUN)
    assert len({str(p).casefold() for p in written}) == len(written) == len(COMMON) + 1 + one_run * len(paths)
    layers = [(tmp_path / "out" / p.name).read_bytes() for p in written if p.name.endswith("layers.csv")]
    assert len(set(layers)) == len(paths)


def test_very_long_run_names(make_run, console, tmp_path, quick_figures):
    paths = [make_run("n" * 240, units=UNITS), make_run("n" * 239 + "m", units=UNITS, seed=1)]
    written = report(paths, tmp_path / "out", console)
    assert len({p.name for p in written if p.name.endswith("layers.csv")}) == 2


def test_duplicate_paths_are_ignored(make_run, console, tmp_path, quick_figures):
    path = make_run(units=UNITS)
    written = report([path, path / "." / "..", path][::2], tmp_path / "out", console)
    assert "layers.csv" in {p.name for p in written}


@pytest.mark.parametrize("stop", ["train", "extract", "slim", "finetune"])
def test_report_of_incomplete_run_names_missing_files(make_run, console, stop, quick_figures):
    path = make_run(units=UNITS, stop=stop)
    names = {p.name for p in report([path], None, console)}
    text = console.file.getvalue()
    assert "interrupted" in text and {"summary.csv", "index.html"} <= names
    assert ("layers.json" in text) == (stop != "finetune") == ("layers.csv" not in names)
    assert ("no model has been measured" in text) == (stop == "train") == ("epochs.csv" not in names)
    assert "gallery/index.json" in text


def test_progress_of_unfinished_run_is_printed(make_run, console, quick_figures):
    path = make_run(units=UNITS, stop="evaluate", epochs=5)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:3]))
    without_checksum(path, "metrics.jsonl")
    report([path], None, console)
    assert "csnet (interrupted; train: epoch 3/5)" in console.file.getvalue()


def test_models_without_metrics_are_explained(make_run, console, quick_figures):
    path = make_run(units=UNITS, stop="finetune")
    summary = json.loads((path / "summary.json").read_text())
    del summary["slim"]["metrics"]
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "state.json").unlink()
    report([path], None, console)
    lines = "".join(line.strip() + " " for line in console.file.getvalue().splitlines())
    assert "slim: no metrics, as it has not been evaluated; prunekit eval" in lines and "--model slim" in lines
    assert "dense: no metrics" not in lines
    page = (path / "report" / "index.html").read_text()
    assert "The slim model has no metrics" in page and "The dense model has no metrics" not in page


def test_damaged_file_is_printed(make_run, console, quick_figures):
    path = make_run(units=UNITS)
    (path / "layers.json").write_text("{}")
    assert "layers.csv" not in {p.name for p in report([path], None, console)}
    assert "layers.json" in console.file.getvalue() and "--from slim" in console.file.getvalue()


def test_failed_equivalence_check_is_printed(make_run, console, quick_figures):
    path = make_run(units=UNITS)
    summary = json.loads((path / "summary.json").read_text())
    summary["equivalence"] |= {"passed": False, "reason": "the output does not vary"}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "state.json").unlink()
    report([path], None, console)
    assert "equivalence check: failed (the output does not vary)" in console.file.getvalue()


@pytest.mark.parametrize("ratio, words", [(0.9, "the slim model has"), (0.1, "above the budget")])
def test_budget_is_printed(make_run, console, quick_figures, ratio, words):
    path = make_run(units=UNITS)
    with (path / "recipe.yaml").open("a") as file:
        file.write(f"target:\n  params: null\n  macs_ratio: {ratio}\n")
    (path / "state.json").unlink()
    assert "budget.csv" in {p.name for p in report([path], None, console)}
    text = console.file.getvalue()
    assert f"budget: macs_ratio {ratio}" in text and words in text and ("above" in text) == (ratio == 0.1)


def test_not_a_run_folder(tmp_path, console):
    for paths in ([], [tmp_path]):
        with pytest.raises(RunFolderError):
            report(paths, None, console)
    assert list(tmp_path.iterdir()) == []


def test_run_names_are_not_console_markup(make_run, console, tmp_path, quick_figures):
    paths = [make_run("[red]a", units=UNITS), make_run("[bold]b", seed=1, units=UNITS)]
    report(paths, tmp_path / "out", console)
    assert "[red]a" in console.file.getvalue() and "[bold]b" in console.file.getvalue()


def test_failed_write_keeps_previous_report(make_run, console, monkeypatch, quick_figures):
    path = make_run(units=UNITS)
    report([path], None, console)
    before = {p.name: p.read_bytes() for p in (path / "report").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        report([path], None, console)
    assert {p.name: p.read_bytes() for p in (path / "report").iterdir()} == before


# ---- figures for papers


def test_figures_have_the_formats_and_the_size_asked_for(make_run, console, tmp_path, few_figures):
    path = make_run(units=UNITS)
    size = FigureSize(width=3.3, font_size=7, dpi=100)
    written = report([path], tmp_path / "out", console, formats=("png", "pdf"), size=size)
    stems = {p.stem for p in written if p.suffix == ".png"}
    assert stems == {p.stem for p in written if p.suffix == ".pdf"} and not any(p.suffix == ".svg" for p in written)
    for stem in stems:
        with Image.open(tmp_path / "out" / f"{stem}.png") as image:
            assert image.width == pytest.approx(330, abs=1), stem
        box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", (tmp_path / "out" / f"{stem}.pdf").read_bytes())
        assert float(box[1]) == pytest.approx(3.3 * 72, abs=0.5), stem
    # Those of the page are for the screen.
    report([path], tmp_path / "plain", console)
    pages = [(tmp_path / name / "index.html").read_text() for name in ("out", "plain")]
    found = [re.findall(r"--natural:(\d+)px", page) for page in pages]
    assert found[0] == found[1] and len(found[0]) == len(stems)


def test_pdfs_are_deterministic(make_run, console, tmp_path, few_figures):
    path = make_run(units=UNITS)
    for name in "ab":
        report([path], tmp_path / name, console, formats=["pdf"])
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.pdf")}
    assert first and first == {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.pdf")}


@pytest.mark.parametrize("formats, message", [("png,gif", "--formats gif: choose from"), ("", "--formats : choose")])
def test_unknown_format_writes_nothing(make_run, tmp_path, capsys, formats, message):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(make_run(units=UNITS)), "--out", str(tmp_path / "out"), f"--formats={formats}"])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_page_links_to_the_files(make_run, console, tmp_path, quick_figures):
    paths = [make_run("50% of #1", units=UNITS), make_run("b", units=UNITS)]
    for html in (None, tmp_path / "pages" / "p.html"):
        written = report(paths, tmp_path / "out", console, html=html)
        page = html or tmp_path / "out" / "index.html"
        links = re.findall(r'<a href="([^"#]+)">([^<]+)</a>', page.read_text())
        assert {kind for _, kind in links} == {"CSV", "JSON", "Markdown", "LaTeX", "PNG", "SVG"}
        targets = {(page.parent / unquote(address)).resolve() for address, _ in links}
        named = {p for p in written if p.suffix != ".html" and not p.name.endswith("epochs.csv")}
        # The notes are in the sections of their runs.
        assert targets == {p for p in named if p.stem != "notes"}


# ---- columns and order


def test_columns_and_sort_apply_to_every_format(make_run, console, tmp_path, quick_figures):
    paths = [make_run(name, seed=i, units=UNITS) for i, name in enumerate("ab")]
    report(paths, tmp_path / "out", console, columns="run,model,mae,params", sort="-mae,-params")
    text = (tmp_path / "out" / "summary.csv").read_text()
    head, *rows = [line.split(",") for line in text.splitlines()]
    assert head == ["run", "model", "mae", "params"]
    order = [(row[0], row[1]) for row in rows]
    assert [model for _, model in order] == ["slim", "slim", "finetuned", "finetuned", "dense", "dense"]
    assert [int(row[3]) for row in rows[:2]] == sorted((int(row[3]) for row in rows[:2]), reverse=True)
    back = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["run"], row["model"]) for row in back] == order and list(back[0]) == head
    for name, first in (("summary.md", 2), ("summary.tex", 5)):
        lines = [
            line for line in (tmp_path / "out" / name).read_text().splitlines() if line.startswith(("| ", "a &", "b &"))
        ]
        found = [tuple(cell.strip(" |") for cell in line.replace("|", "&").strip("&").split("&"))[:2] for line in lines]
        assert [(run, model.replace("-", "")) for run, model in found[-6:]] == order, (name, first)
    shown = [line.split()[:2] for line in console.file.getvalue().splitlines() if line[:2] in ("a ", "b ")]
    assert [tuple(pair) for pair in shown[:6]] == order


@pytest.mark.parametrize("option", ["columns", "sort"])
def test_unknown_column_writes_nothing(make_run, console, tmp_path, option):
    path = make_run(units=UNITS)
    with pytest.raises(PrunekitError, match=r"parms: no such column, did you mean 'params'\?"):
        report([path], tmp_path / "out", console, **{option: "parms"})
    assert not (tmp_path / "out").exists() and not (path / "report").exists()


def test_command_line_options(make_run, tmp_path, capsys, quick_figures):
    path = make_run(units=UNITS)
    arguments = [
        "--out",
        tmp_path / "out",
        "--html",
        tmp_path / "pages" / "a.html",
        "--columns=model,params",
        "--layers",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["report", str(path), *map(str, arguments), "--sort=-params"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "stage4.3.block" in out and "max_f" not in out.partition("equivalence")[0]
    assert (tmp_path / "out" / "summary.csv").read_text().startswith("model,params\ndense,")
    assert (tmp_path / "pages" / "a.html").exists() and not (tmp_path / "out" / "index.html").exists()


# ---- failures


def test_failed_figures_are_reported_and_others_written(make_run, console, monkeypatch):
    class Broken(Figure):
        def savefig(self, *_, **__):
            raise RuntimeError("no\nink")

        draw_without_rendering = savefig

    def first_figures(run):
        for name, kind in (("one", Figure), ("two", Broken), ("three", Figure)):
            yield ReportFigure(name, name, "A caption.", kind(figsize=(0.5, 0.5)))
        raise ValueError("no paper")

    def last_figures(run):
        yield ReportFigure("four", "four", "A caption.", Figure(figsize=(0.5, 0.5)))

    monkeypatch.setattr("prunekit.reporting.figures.tradeoff_figures", lambda runs: iter(()))
    monkeypatch.setattr("prunekit.reporting.figures.RUN_FIGURES", (first_figures, last_figures))
    names = {p.name for p in report([make_run(units=UNITS)], None, console)}
    drawn = {f"{name}.{kind}" for name in ("one", "three", "four") for kind in ("png", "svg")}
    assert {*drawn, "index.html", "layers.csv"} <= names
    assert not {"two.png", "two.svg"} & names
    text = console.file.getvalue()
    assert "the figure two could not be drawn (RuntimeError: no ink)" in text
    assert "the figures first of csnet could not be drawn (ValueError: no paper)" in " ".join(text.split())


def test_failed_page_is_reported_and_raises_only_if_requested(make_run, console, monkeypatch, tmp_path, quick_figures):
    def page(*_, **__):
        raise KeyError("word")

    monkeypatch.setitem(report.__globals__, "render_page", page)
    path = make_run(units=UNITS)
    assert "layers.csv" in {p.name for p in report([path], None, console)}
    assert "index.html could not be created (KeyError: 'word')" in console.file.getvalue()
    with pytest.raises(PrunekitError, match="could not be created"):
        report([path], None, console, html=tmp_path / "a.html")


def test_import_needs_no_torch_and_no_pyplot():
    code = "import sys, prunekit.reporting; assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- published models


def test_published_models_without_runs(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report([], None, console, published=True) == [] and list(tmp_path.iterdir()) == []
    text = console.file.getvalue()
    assert "ECSSD" in text and "CSNet-L ×1" in text and "0.898" in text and "no model has been" not in text
    written = report([], "out", console, published=True)
    assert [p.name for p in written] == [*files("summary"), "index.html"]
    assert '"published, ECSSD",CSNet-L ×2,140894,718394292,0.9156' in written[0].read_text()


def test_published_models_are_in_the_files_of_a_run(make_run, console, quick_figures):
    for stop in (None, "train"):
        path = make_run(str(stop), units=UNITS, stop=stop)
        report([path], None, console, published=True)
        assert "CSNet-L ×1" in (path / "report" / "summary.md").read_text()
        report([path], None, console)
        assert "CSNet-L ×1" not in (path / "report" / "summary.md").read_text()
    assert "no model has been measured yet" in console.file.getvalue()
