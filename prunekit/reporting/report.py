"""The report of one run or several: tables, figures and a page in one flat folder, and a summary in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from prunekit.errors import PrunekitError, RunFolderError
from prunekit.reporting.columns import arrange_table
from prunekit.reporting.figures import encode_figure, figures
from prunekit.reporting.html.page import Illustration, illustrate, page
from prunekit.reporting.loader import Run, load_run
from prunekit.reporting.number_format import file_stem
from prunekit.reporting.table_writers import write_csv, write_table
from prunekit.reporting.tables import Named, epochs_table, summary_table, tables
from prunekit.reporting.terminal_report import one_line, print_report
from prunekit.utils.io import write_atomic


@dataclass
class Written:
    """What a report consists of.

    Attributes:
        folder: where the tables and figures lie.
        tables: the stems of the tables that there are in all formats.
        epochs: the names of the tables of epochs, which are CSV only.
        figures: the stems of the figures.
        page: the page.
        failed: what could not be made, a line each.
        paths: all files.
    """

    folder: Path
    tables: list[str] = field(default_factory=list)
    epochs: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    page: Path | None = None
    failed: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


def report(
    paths: Sequence[str | Path],
    out: str | Path | None,
    console: Console,
    *,
    html: str | Path | None = None,
    columns: str | None = None,
    sort: str | None = None,
    layers: bool = False,
    published: bool = False,
) -> list[Path]:
    """Write the tables, the figures and the page of these runs, and print the summary.

    A figure that fails costs none of the others; it is said by name.

    Args:
        paths: run folders, complete or not; one that is given twice counts once.
        out: the folder for the files; None means ``RUN/report`` for one run and ``report`` for several.
        console: where the summary and what was written go.
        html: the page; None means ``index.html`` in the folder.
        columns: the columns of the summary, with commas between; see :func:`prunekit.reporting.columns.arrange_table`.
        sort: the columns that the rows of the summary are sorted by, likewise; ``-params`` for the largest first.
        layers: print the table of layers too.
        published: put the published CSNet models below the runs; without a run their table is printed alone, and
            written only where ``out`` or ``html`` is given.

    Returns:
        The files written. For several runs the names of those about one run begin with the run's name.

    Raises:
        RunFolderError: a folder is no run folder, or none is given.
        PrunekitError: there is no such column.
        CheckpointError: a file cannot be written.
    """
    distinct = {Path(path).resolve(): Path(path) for path in reversed(paths)}
    runs = _distinctly_named([load_run(path) for path in reversed(distinct.values())])
    if not (runs or published):
        raise RunFolderError("no run folder is given; name one, such as runs/csnet")
    # Before anything is written.
    summary = arrange_table(summary_table(runs, published), columns, sort)
    written = None
    if runs or out is not None or html is not None:
        folder = Path(out) if out is not None else runs[0].path / "report" if len(runs) == 1 else Path("report")
        written = Written(folder)
        _write_tables(
            runs,
            [replace(one, table=summary) if one.name == "summary" else one for one in tables(runs, published)],
            written,
        )
        drawn = list(_write_figures(runs, written))
        _write_page(runs, drawn, html, published, written)
    print_report(runs, written, console, published=published, columns=columns, sort=sort, layers=layers)
    return written.paths if written is not None else []


def _write_tables(runs: Sequence[Run], named: Sequence[Named], written: Written) -> None:
    for one in named:
        written.paths += write_table(one.table, written.folder / one.name, one.narrow)
        written.tables.append(one.name)
    for run in runs:
        if len(run.metrics):
            name = f"{file_stem(run.name)}-epochs.csv" if len(runs) > 1 else "epochs.csv"
            written.paths.append(write_csv(epochs_table(run), written.folder / name))
            written.epochs.append(name)


def _write_figures(runs: Sequence[Run], written: Written) -> Iterator[Illustration]:
    """Write each figure as PNG and SVG, and give what the page shows of it."""
    drawings, last = iter(figures(runs, written.failed)), None
    while True:
        try:
            drawing = next(drawings, None)
        except Exception as error:
            after = f"the figures after {last}" if last else "the figures"
            written.failed.append(f"{after} could not be drawn ({one_line(error)})")
            return
        if drawing is None:
            return
        last = drawing.name
        try:
            files = {kind: encode_figure(drawing.figure, kind) for kind in ("png", "svg")}
            shown = illustrate(drawing, files)
        except Exception as error:
            # What a figure of damaged data can make matplotlib raise is not for us to list.
            written.failed.append(f"the figure {drawing.name} could not be drawn ({one_line(error)})")
            continue
        for kind, data in files.items():
            path = written.folder / f"{drawing.name}.{kind}"
            write_atomic(path, data)
            written.paths.append(path)
        written.figures.append(drawing.name)
        yield shown


def _write_page(
    runs: Sequence[Run], drawn: Sequence[Illustration], html: str | Path | None, published: bool, written: Written
) -> None:
    path = Path(html) if html is not None else written.folder / "index.html"
    try:
        text = page(runs, drawn, published)
    except Exception as error:
        if html is not None:
            raise PrunekitError(f"the page {path} could not be made ({one_line(error)})") from error
        written.failed.append(f"the page {path} could not be made ({one_line(error)})")
        return
    write_atomic(path, text.encode(errors="replace"))
    written.page = path
    written.paths.append(path)


def _distinctly_named(runs: Sequence[Run]) -> list[Run]:
    """Runs whose names differ, also on a file system that takes capitals for small letters."""
    names = [run.name.casefold() for run in runs]
    taken: set[str] = set()
    out = []
    for run, folded in zip(runs, names, strict=True):
        wanted = f"{run.path.resolve().parent.name}-{run.name}" if names.count(folded) > 1 else run.name
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name.casefold())
        out.append(replace(run, name=name))
    return out
