"""The report of one run or several: tables and plots in one flat folder, and a summary in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from prunekit.errors import RunFolderError
from prunekit.reporting.load import Run, load_run
from prunekit.reporting.plots import channels_figure, params_macs_figure, totals_figure, write_figure
from prunekit.reporting.tables import (
    counters_table,
    layers_table,
    summary_table,
    terminal_table,
    write_csv,
    write_markdown,
)


def report(
    paths: Sequence[str | Path], out: str | Path | None, console: Console, *, published: bool = False
) -> list[Path]:
    """Write the tables and plots of these runs, and print the summary.

    Args:
        paths: run folders, complete or not; one that is given twice counts once.
        out: the folder for the files; None means ``RUN/report`` for one run and ``report`` for several.
        console: where the summary and the list of files go.
        published: put the published CSNet models below the runs; without a run their table is printed alone, and
            written only where ``out`` is given.

    Returns:
        The files written. For several runs the names of those about one run begin with the run's name.

    Raises:
        RunFolderError: a folder is no run folder, or none is given.
        CheckpointError: a file cannot be written.
    """
    distinct = {Path(path).resolve(): Path(path) for path in reversed(paths)}
    runs = _distinctly_named([load_run(path) for path in reversed(distinct.values())])
    if not (runs or published):
        raise RunFolderError("no run folder is given; name one, such as runs/csnet")
    folder = Path(out) if out is not None else runs[0].path / "report" if len(runs) == 1 else Path("report")
    written = _write(runs, folder, published) if runs or out is not None else []
    _print(runs, written, console, published)
    return written


def _write(runs: Sequence[Run], folder: Path, published: bool) -> list[Path]:
    summary = summary_table(runs, published)
    written = [write_csv(summary, folder / "summary.csv"), write_markdown(summary, folder / "summary.md")]
    for run in runs:
        prefix = f"{run.name}-" if len(runs) > 1 else ""
        if len(run.counters):
            table = counters_table(run)
            written.append(write_csv(table, folder / f"{prefix}counters.csv"))
            written.append(write_markdown(table, folder / f"{prefix}counters.md"))
        if len(run.layers):
            table = layers_table(run)
            written.append(write_csv(table, folder / f"{prefix}layers.csv"))
            written.append(write_markdown(table, folder / f"{prefix}layers.md"))
            written += write_figure(channels_figure(run), folder / f"{prefix}channels")
            written += write_figure(params_macs_figure(run), folder / f"{prefix}params_macs")
    if len(runs) > 1 and len(summary_table(runs)):
        written += write_figure(totals_figure(runs), folder / "totals")
    return written


def _print(runs: Sequence[Run], written: Sequence[Path], console: Console, published: bool) -> None:
    if len(runs) == 1:
        console.print(Text(f"{runs[0].name} ({runs[0].status})"))
    if runs and not len(summary_table(runs)):
        console.print("no model has been measured yet")
    if len(summary_table(runs, published)):
        console.print(terminal_table(runs, console, published))
    for run in runs:
        if len(runs) > 1 and run.status != "complete":
            console.print(Text(f"{run.name} is not complete ({run.status})"))
        for line in run.missing:
            console.print(Text(f"missing in {run.path}: {line}"), soft_wrap=True)
        if not len(run.layers):
            console.print(Text(f"without its layers, {run.name} gets no tables and plots of layers"))
    if written:
        console.print("written:")
    for path in written:
        console.print(Text(f"  {path}"), soft_wrap=True)


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
