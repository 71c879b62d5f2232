"""Print a report in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from prunekit.reporting import tables
from prunekit.reporting.loader import MISSING, MODELS, Run
from prunekit.reporting.number_format import format_seconds, printable
from prunekit.reporting.terminal_tables import terminal_layers, terminal_summary, terminal_table


def print_report(
    runs: Sequence[Run],
    console: Console,
    folder: Path,
    paths: Sequence[Path],
    errors: Sequence[str],
    *,
    published: bool,
    columns: str | None,
    sort: str | None,
    layers: bool,
) -> None:
    """Print the summary, further measurements, the problems of the runs, and the files of the report.

    The keywords are those of :func:`prunekit.reporting.report`; ``errors`` are lines on what could not be written.
    """
    several = len(runs) > 1
    if len(runs) == 1:
        _print(console, f"{runs[0].name} ({_progress(runs[0])})")
    if runs and not len(tables.summary_table(runs)):
        console.print("no model has been measured yet")
    if len(tables.summary_table(runs, published)):
        console.print(terminal_summary(runs, console, published, columns, sort))
    for title, table in (("datasets", tables.evals_table(runs)), ("latency", tables.bench_table(runs))):
        if len(table):
            console.print(f"{title}:", terminal_table(table, several, console), sep="\n")
    for run in runs:
        details = list(_details(run, console))
        if several and (details or run.status != "complete" or run.problems or layers):
            _print(console, f"{run.name} ({_progress(run)})")
        for detail in details:
            if isinstance(detail, str):
                _print(console, detail, fold=True)
            else:
                console.print(detail)
        if layers and len(run.layers):
            console.print(terminal_layers(run))
        for line in _problems(run):
            _print(console, line)
    for line in errors:
        _print(console, line)
    for line in _file_list(folder, paths):
        _print(console, line, fold=line.startswith(" "))


def _print(console: Console, text: str, fold: bool = False) -> None:
    """Print a line; with ``fold`` it continues on further, indented lines at the width of the terminal."""
    text = printable(text)
    if fold:
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        width = max(console.width, 20)
        lines = wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(lines)
    console.print(Text(text), soft_wrap=True)


def _progress(run: Run) -> str:
    if run.status == "complete" or not len(run.metrics):
        return run.status
    last = run.metrics.iloc[-1]
    epochs = run.setting(f"{last['stage']}.epochs")
    return f"{run.status}; {last['stage']}: epoch {last['epoch']}{f'/{epochs}' if isinstance(epochs, int) else ''}"


def _details(run: Run, console: Console) -> Iterator[Any]:
    """Yield lines, and a table where counters differ."""
    equivalence = run.summary.get("equivalence") or {}
    if "passed" in equivalence:
        verdict = "passed" if equivalence["passed"] else f"failed ({equivalence.get('reason', 'no reason given')})"
        differences = (("largest difference", "max_abs_diff"), ("tolerance", "tolerance"))
        values = [f"{title} {equivalence[key]:.1e}" for title, key in differences if key in equivalence]
        yield f"equivalence check: {', '.join([verdict, *values])}"
    for model in (model for model in MODELS if run.model(model) and not run.model_metrics(model)):
        yield f"{model}: no metrics, as it has not been evaluated; prunekit eval {run.path} --model {model}"
    for row in tables.budget_table([run]).to_dict("records"):
        yield _budget(row)
    yield from _counters(run, console)
    for note in tables.notes_table([run])["note"]:
        yield f"note: {note}"
    seconds = tables.seconds_table([run])
    if len(seconds):
        stages = seconds.iloc[0].drop(["run", "total s"]).dropna()
        times = [f"{stage.removesuffix(' s')} {format_seconds(t)}" for stage, t in stages.items() if t >= 0.05]
        yield f"time: {', '.join([*times, 'total ' + format_seconds(seconds['total s'][0])])}"


def _budget(row: dict[str, Any]) -> str:
    text = f"budget: {row['target']}"
    if "ratio" in row["target"] and not pd.isna(row["budget"]):
        text += f" ({row['budget']:,} {row['measure']})"
    if row["within budget"] is None:
        return text
    return f"{text}; the slim model has {row['slim']:,}{', above the budget' if row['within budget'] == 'no' else ''}"


def _counters(run: Run, console: Console) -> Iterator[Any]:
    table, agreeing = tables.differing_counters(tables.counters_table(run))
    if "note" in table:
        yield "counters that differ:"
        yield terminal_table(table.drop(columns="note"), False, console)
        yield from (f"  {row.model} {row.quantity}: {row.note}" for row in table.itertuples())
    elif agreeing:
        yield f"counters: prunekit, {', '.join(agreeing)} agree on params and {tables.layers_macs_title(run)}"


def _problems(run: Run) -> Iterator[str]:
    """Yield one line for all missing files, and one for each damaged file."""
    missing = [line.removesuffix(MISSING) for line in run.problems if line.endswith(MISSING)]
    if missing:
        yield f"missing in {run.path}: {', '.join(missing)}"
    for line in run.problems:
        if not line.endswith(MISSING):
            yield f"problem in {run.path}: {line}"
    if not len(run.layers):
        yield f"{run.name} has no layers.json, so there are no tables and figures of its layers"


def _file_list(folder: Path, paths: Sequence[Path]) -> Iterator[str]:
    """Yield the files grouped by format: "summary, layers (.csv .json .md .tex)"."""
    suffixes: dict[Path, tuple[str, ...]] = {}
    for path in paths:
        stem = (path.relative_to(folder) if path.parent == folder else path).with_suffix("")
        suffixes[stem] = (*suffixes.get(stem, ()), path.suffix)
    if paths:
        yield f"report written to {folder}:"
    for kinds in dict.fromkeys(suffixes.values()):
        stems = [str(stem) for stem, own in suffixes.items() if own == kinds]
        if len(kinds) == 1:
            yield f"  {', '.join(f'{stem}{kinds[0]}' for stem in stems)}"
        else:
            yield f"  {', '.join(stems)} ({' '.join(kinds)})"
