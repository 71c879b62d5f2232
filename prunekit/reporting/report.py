"""The report of one or several runs: tables, figures and a page in one flat folder, and a summary in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from prunekit.errors import PrunekitError, RunFolderError
from prunekit.reporting.columns import arrange_table
from prunekit.reporting.figures import encode_figure, report_figures
from prunekit.reporting.html.figures import EmbeddedFigure, embed_figure
from prunekit.reporting.html.page import render_page
from prunekit.reporting.loader import Run, load_run
from prunekit.reporting.number_format import file_stem
from prunekit.reporting.table_writers import write_csv, write_table
from prunekit.reporting.tables import ReportTable, epochs_table, report_tables, summary_table
from prunekit.reporting.terminal_report import one_line, print_report
from prunekit.utils.io import write_atomic


@dataclass
class ReportFiles:
    """The files of a report.

    Attributes:
        folder: contains the tables and figures.
        tables: stems of the tables that are written in all formats.
        epochs: names of the epoch tables, which are CSV only.
        figures: stems of the figures.
        page: the HTML page.
        failed: what could not be created, a line each.
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
    """Write the tables, the figures and the page of the runs, and print the summary.

    A figure that fails is reported by name; the others are written nevertheless.

    Args:
        paths: run folders, complete or not; duplicates are ignored.
        out: folder for the files; None: ``RUN/report`` for one run and ``report`` for several.
        console: prints the summary and the names of the files.
        html: path of the page; None: ``index.html`` in the folder.
        columns: comma-separated columns of the summary; see :func:`prunekit.reporting.columns.arrange_table`.
        sort: comma-separated columns to sort the summary by; ``-params`` for descending order.
        layers: print the table of layers too.
        published: append the published CSNet models; without a run their table is only printed, unless ``out`` or
            ``html`` is given.

    Returns:
        The files written. With several runs, the names of files about one run start with the run's name.

    Raises:
        RunFolderError: a path is not a run folder, or none is given.
        PrunekitError: there is no such column.
        CheckpointError: a file cannot be written.
    """
    distinct = {Path(path).resolve(): Path(path) for path in reversed(paths)}
    runs = _with_distinct_names([load_run(path) for path in reversed(distinct.values())])
    if not (runs or published):
        raise RunFolderError("no run folder is given; name one, such as runs/csnet")
    # An unknown column must be reported before anything is written.
    summary = arrange_table(summary_table(runs, published), columns, sort)
    files = None
    if runs or out is not None or html is not None:
        files = ReportFiles(
            Path(out) if out is not None else runs[0].path / "report" if len(runs) == 1 else Path("report")
        )
        tables = report_tables(runs, published)
        _write_tables(runs, [replace(tables[0], data=summary), *tables[1:]], files)
        figures = list(_write_figures(runs, files))
        _write_page(runs, figures, html, published, files)
    print_report(runs, files, console, published=published, columns=columns, sort=sort, layers=layers)
    return files.paths if files is not None else []


def _write_tables(runs: Sequence[Run], tables: Sequence[ReportTable], files: ReportFiles) -> None:
    for table in tables:
        files.paths += write_table(table.data, files.folder / table.stem, table.latex_columns)
        files.tables.append(table.stem)
    for run in (run for run in runs if len(run.metrics)):
        name = f"{file_stem(run.name)}-epochs.csv" if len(runs) > 1 else "epochs.csv"
        files.paths.append(write_csv(epochs_table(run), files.folder / name))
        files.epochs.append(name)


def _write_figures(runs: Sequence[Run], files: ReportFiles) -> Iterator[EmbeddedFigure]:
    """Write each figure as PNG and SVG, and yield its form for the page."""
    figures, last = iter(report_figures(runs, files.failed)), None
    while True:
        try:
            figure = next(figures, None)
        except Exception as error:
            failed = f"the figures after {last}" if last else "the figures"
            files.failed.append(f"{failed} could not be drawn ({one_line(error)})")
            return
        if figure is None:
            return
        last = figure.stem
        try:
            encoded = {kind: encode_figure(figure.figure, kind) for kind in ("png", "svg")}
            embedded = embed_figure(figure, encoded)
        except Exception as error:  # matplotlib may raise anything on damaged data.
            files.failed.append(f"the figure {figure.stem} could not be drawn ({one_line(error)})")
            continue
        for kind, data in encoded.items():
            path = files.folder / f"{figure.stem}.{kind}"
            write_atomic(path, data)
            files.paths.append(path)
        files.figures.append(figure.stem)
        yield embedded


def _write_page(
    runs: Sequence[Run], figures: Sequence[EmbeddedFigure], html: str | Path | None, published: bool, files: ReportFiles
) -> None:
    path = Path(html) if html is not None else files.folder / "index.html"
    try:
        text = render_page(runs, figures, published)
    except Exception as error:
        message = f"the page {path} could not be created ({one_line(error)})"
        if html is not None:
            raise PrunekitError(message) from error
        files.failed.append(message)
        return
    write_atomic(path, text.encode(errors="replace"))
    files.page = path
    files.paths.append(path)


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Rename runs so that their names differ on a case-insensitive file system too."""
    names = [run.name.casefold() for run in runs]
    taken: set[str] = set()
    renamed = []
    for run in runs:
        wanted = run.name if names.count(run.name.casefold()) == 1 else f"{run.path.resolve().parent.name}-{run.name}"
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name.casefold())
        renamed.append(replace(run, name=name))
    return renamed
