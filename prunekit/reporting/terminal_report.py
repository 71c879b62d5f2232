"""What a report says in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from prunekit.reporting.loader import COUNTERS, Run
from prunekit.reporting.number_format import seconds_text
from prunekit.reporting.tables import (
    bench_table,
    budget_table,
    counters_table,
    evals_table,
    layers_macs_title,
    notes_table,
    seconds_table,
    summary_table,
)
from prunekit.reporting.terminal_tables import layers_listing, listing, plain, terminal_table

_NOT_THERE = ": not there"
_DIFFERENCES = {"largest difference": "max_abs_diff", "tolerance": "tolerance"}


def print_report(
    runs: Sequence[Run],
    written: Any,
    console: Console,
    *,
    published: bool,
    columns: str | None,
    sort: str | None,
    layers: bool,
) -> None:
    """Print the summary, what else was measured, what is missing, and what was written.

    Args:
        written: a :class:`prunekit.reporting.report.Written`, or None.
        others: as for :func:`prunekit.reporting.report`.
    """
    several = len(runs) > 1
    if len(runs) == 1:
        _say(console, f"{runs[0].name} ({_state(runs[0])})")
    if runs and not len(summary_table(runs)):
        console.print("no model has been measured yet")
    if len(summary_table(runs, published)):
        console.print(terminal_table(runs, console, published, columns, sort))
    for title, table in (("data sets", evals_table(runs)), ("latency", bench_table(runs))):
        if len(table):
            _say(console, f"{title}:")
            console.print(listing(table, console, several))
    for run in runs:
        lines = list(_about(run, console))
        if several and (lines or run.status != "complete" or run.missing or layers):
            _say(console, f"{run.name} ({_state(run)})")
        for line in lines:
            console.print(line) if not isinstance(line, str) else _say(console, line, fold=True)
        if layers and len(run.layers):
            console.print(layers_listing(run))
        for line in _missing(run):
            _say(console, line)
    if written is not None:
        for line in written.failed:
            _say(console, line)
        for line in _listed(written):
            _say(console, line, fold=line.startswith(" "))


def one_line(error: BaseException) -> str:
    """An error of any kind in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _say(console: Console, text: str, fold: bool = False) -> None:
    """A line; with ``fold`` it goes on in further lines, indented, where the terminal ends."""
    text = plain(text)
    if fold:
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        width = max(console.width, 20)
        text = "\n".join(
            wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        )  # fmt: skip
    console.print(Text(text), soft_wrap=True)


def _state(run: Run) -> str:
    if run.status == "complete" or not len(run.metrics):
        return run.status
    last = run.metrics.iloc[-1]
    of = run.setting(f"{last['stage']}.epochs")
    return f"{run.status}; {last['stage']}: {last['epoch']}{f' of {of}' if isinstance(of, int) else ''} epochs done"


def _about(run: Run, console: Console) -> Iterator[Any]:
    """The equivalence check, the budget, the counters, the notes and the time: lines, and a table where counters differ."""
    yield from _equivalence(run.summary.get("equivalence") or {})
    for row in budget_table([run]).to_dict("records"):
        yield _budget(row)
    yield from _counters(run, console)
    for note in notes_table([run])["note"]:
        yield f"note: {note}"
    taken = seconds_table([run])
    if len(taken):
        row = taken.iloc[0].drop(["run", "total s"]).dropna()
        stages = [f"{stage.removesuffix(' s')} {seconds_text(took)}" for stage, took in row.items() if took >= 0.05]
        yield f"time: {', '.join([*stages, 'total ' + seconds_text(taken['total s'][0])])}"


def _equivalence(equivalence: dict[str, Any]) -> Iterator[str]:
    if not isinstance(equivalence.get("passed"), bool):
        return
    words = ["passed" if equivalence["passed"] else f"failed ({equivalence.get('reason', 'no reason is given')})"]
    words += [f"{word} {equivalence[key]:.1e}" for word, key in _DIFFERENCES.items() if key in equivalence]
    yield f"equivalence check: {', '.join(words)}"


def _budget(row: dict[str, Any]) -> str:
    goal = f" ({row['budget']:,} {row['measure']})" if "ratio" in row["asked"] and not pd.isna(row["budget"]) else ""
    held = {
        "yes": f"the slim model has {row['slim']:,}",
        "no": f"the slim model has {row['slim']:,}, which is above it",
    }
    return f"budget: {row['asked']}{goal}" + (f"; {held[row['within']]}" if row["within"] in held else "")


def _counters(run: Run, console: Console) -> Iterator[Any]:
    table = counters_table(run)
    differ = table[table["note"] != ""]
    others = [name for name in COUNTERS[1:] if table[name].notna().any()]
    if len(differ):
        yield "counters, where they differ:"
        yield listing(differ.drop(columns="note"), console, False)
        yield from (f"  {row.model} {row.quantity}: {row.note}" for row in differ.itertuples())
    elif others:
        yield f"counters: ours, {', '.join(others)} agree on params and {layers_macs_title(run)}"


def _missing(run: Run) -> Iterator[str]:
    """What is not there in one line, and what is damaged in a line each."""
    absent = [line.removesuffix(_NOT_THERE) for line in run.missing if line.endswith(_NOT_THERE)]
    if absent:
        yield f"missing in {run.path}: {', '.join(absent)}"
    for line in run.missing:
        if not line.endswith(_NOT_THERE):
            yield f"wrong in {run.path}: {line}"
    if not len(run.layers):
        yield f"without its layers, {run.name} gets no tables and figures of layers"


def _listed(written: Any) -> Iterator[str]:
    yield f"written to {written.folder}:"
    tables = [f"{', '.join(written.tables)} (.csv .json .md .tex)"] if written.tables else []
    if tables or written.epochs:
        yield f"  tables   {', '.join([*tables, *written.epochs])}"
    if written.figures:
        yield f"  figures  {', '.join(written.figures)} (.png .svg)"
    if written.page is not None:
        inside = written.page.parent == written.folder
        yield f"  page     {written.page.name if inside else written.page}"
