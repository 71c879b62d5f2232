"""The report of one or several runs: tables, figures and a page in one flat folder, and a summary in the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from prunekit.config.registry import describe_error
from prunekit.errors import PrunekitError, RunFolderError
from prunekit.reporting.columns import arrange_table
from prunekit.reporting.figures import encode_figure, report_figures
from prunekit.reporting.figures.style import DEFAULT_SIZE, FigureKind, FigureSize, figure_size
from prunekit.reporting.html.figures import EmbeddedFigure, embed_figure
from prunekit.reporting.html.page import render_page
from prunekit.reporting.loader import Run, load_run
from prunekit.reporting.number_format import file_stem
from prunekit.reporting.table_writers import write_csv, write_table
from prunekit.reporting.tables import ReportTable, epochs_table, report_tables, summary_table
from prunekit.reporting.terminal_report import print_report
from prunekit.utils.io import write_atomic
from prunekit.weights import is_shipped


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
    formats: Sequence[FigureKind] = ("png", "svg"),
    size: FigureSize = DEFAULT_SIZE,
) -> list[Path]:
    """Write the tables, the figures and the page of the runs, and print the summary.

    A figure that fails is reported by name; the others are written nevertheless.

    Args:
        paths: run folders, complete or not; duplicates are ignored.
        out: folder for the files; None: ``RUN/report`` for one run and ``report`` for several.
        console: prints the summary and the names of the files.
        html: path of the page; None: ``index.html`` in the folder.
        columns, sort: of the summary; see :func:`prunekit.reporting.columns.arrange_table`.
        layers: print the table of layers too.
        formats: of the figures: "png", "svg" and "pdf".
        size: width, font size and resolution of the figures in the files; the page has its own.
        published: append the published CSNet models; without a run and ``out`` or ``html`` they are only printed.

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
    if wrong := [kind for kind in formats if kind not in ("png", "svg", "pdf")]:
        raise PrunekitError(f"--formats {wrong[0]}: choose from png, svg, pdf")
    paths_written: list[Path] = []
    errors: list[str] = []
    has_own_folder = len(runs) == 1 and not is_shipped(runs[0].path)
    folder = Path(out) if out is not None else runs[0].path / "report" if has_own_folder else Path("report")
    if runs or out is not None or html is not None:
        tables = report_tables(runs, published)
        latex_columns = tables[0].latex_columns if columns is None else None
        tables[0] = replace(tables[0], data=summary, latex_columns=latex_columns)
        paths_written += _write_tables(runs, tables, folder)
        figures = list(_write_figures(runs, folder, formats, size, (paths_written, errors)))
        page = Path(html) if html is not None else folder / "index.html"
        try:
            text = render_page(runs, figures, published, _links(paths_written, page.parent))
        except Exception as error:
            errors.append(f"the page {page} could not be created ({describe_error(error)})")
            if html is not None:
                raise PrunekitError(errors[-1]) from error
        else:
            write_atomic(page, text.encode(errors="replace"))
            paths_written.append(page)
    options = {"published": published, "columns": columns, "sort": sort, "layers": layers}
    print_report(runs, console, folder, paths_written, errors, **options)
    return paths_written


def _write_tables(runs: Sequence[Run], tables: Sequence[ReportTable], folder: Path) -> Iterator[Path]:
    for table in tables:
        yield from write_table(table.data, folder / table.stem, table.latex_columns, narrow=table.name == "summary")
    for run in (run for run in runs if len(run.metrics)):
        name = f"{file_stem(run.name)}-epochs.csv" if len(runs) > 1 else "epochs.csv"
        yield write_csv(epochs_table(run), folder / name)


def _links(paths: Sequence[Path], start: Path) -> dict[str, list[tuple[str, str]]]:
    """Return for the stem of each file its formats with their addresses relative to the page."""
    links: dict[str, list[tuple[str, str]]] = {}
    for path in paths:
        address = Path(os.path.relpath(path, start)).as_posix()
        links.setdefault(path.stem, []).append((path.suffix[1:], quote(address.encode(errors="replace"))))
    return links


def _write_figures(
    runs: Sequence[Run],
    folder: Path,
    formats: Sequence[FigureKind],
    size: FigureSize,
    out: tuple[list[Path], list[str]],
) -> Iterator[EmbeddedFigure]:
    """Write the files of each figure, add them or an error to ``out``, and yield the figure for the page."""
    paths, errors = out
    # Texts of the page's figures must be readable in the browser, whatever the files are for.
    resized = report_figures(runs) if size != DEFAULT_SIZE else None
    for figure in report_figures(runs, errors):
        try:
            encoded = {kind: encode_figure(figure.figure, kind) for kind in {"png", "svg", *formats}}
            embedded = embed_figure(figure, encoded)
            if resized is not None:
                with figure_size(size):
                    own = next(resized).figure
                    encoded = {kind: encode_figure(own, kind) for kind in formats}
        except Exception as error:  # matplotlib may raise anything on damaged data.
            errors.append(f"the figure {figure.stem} could not be drawn ({describe_error(error)})")
            continue
        for kind in formats:
            path = folder / f"{figure.stem}.{kind}"
            write_atomic(path, encoded[kind])
            paths.append(path)
        yield embedded


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
