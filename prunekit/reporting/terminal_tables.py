"""Tables that fit the width of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prunekit.reporting.columns import arrange_table
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import NOT_AVAILABLE, compact_number, format_size, printable, short_number
from prunekit.reporting.published import LABEL
from prunekit.reporting.table_writers import format_cells, is_numeric
from prunekit.reporting.tables import LATENCY, MACS, MACS_RATIO, PAPER_FLOPS, PARAMS_RATIO, SECONDS, summary_table

_NOT_METRICS = {"run", "model", "params", PAPER_FLOPS, PARAMS_RATIO, MACS_RATIO, SECONDS}
# Of a measurement, as opposed to its results.
_SETTINGS = {"mode", "images", "skipped", "form", "batch", "size", "threads", "device"}
_HEADERS = {
    PAPER_FLOPS: "paper\nFLOPs",
    "s_measure": "s_mea-\nsure",
    PARAMS_RATIO: "params\n÷dense",
    MACS_RATIO: "MACs\n÷dense",
}


def terminal_summary(
    runs: Sequence[Run],
    console: Console,
    published: bool = False,
    columns: str | None = None,
    sort: str | None = None,
) -> Table:
    """Return the summary as a table no wider than the console; columns that do not fit are named in the caption.

    The published models are in a section of their own unless the rows are sorted; ``columns`` and ``sort`` are as for
    :func:`prunekit.reporting.columns.arrange_table`.
    """
    table = arrange_table(summary_table(runs, published), None, sort)
    shown = list(arrange_table(table, columns, None).columns)
    if columns is None:
        shown = [c for c in shown if c in ("run", "model") or table[c].notna().any()]
        if len(runs) < 2 and not (published and sort):
            shown.remove("run")
        removable = _least_important_first(table, shown, published)
    else:
        # The user names the most important columns first.
        removable = [c for c in shown if c not in ("run", "model")][:0:-1]
    return _fit(lambda shown, left_out: _summary(table, shown, left_out, sort is not None), shown, removable, console)


def _fit(
    build: Callable[[list[str], list[str]], Table], shown: list[str], removable: list[str], console: Console
) -> Table:
    """Return ``build(shown, left_out)`` with as many columns as fit; the first of ``removable`` are left out first."""
    left_out: list[str] = []
    for column in (column for column in removable if column in shown):
        if fits(build(shown, left_out), console):
            break
        shown = [c for c in shown if c != column]
        left_out.append(column)
    return build(shown, left_out)


def _least_important_first(table: pd.DataFrame, shown: list[str], published: bool) -> list[str]:
    """Return the columns that may be left out, the most redundant first; the first metric of each task stays."""
    metrics = [c for c in table.columns if c not in _NOT_METRICS and not c.startswith((MACS, LATENCY))]
    # For each metric its best position (0 is first) among the metrics of any model.
    ranks: dict[str, int] = {}
    for available in table[metrics].notna().to_numpy():
        for rank, metric in enumerate(compress(metrics, available)):
            ranks[metric] = min(rank, ranks.get(metric, rank))
    others = sorted((c for c in ranks if ranks[c] > 1), key=lambda c: (-ranks[c], -shown.index(c) if c in shown else 0))
    second_metrics = [metric for metric, rank in ranks.items() if rank == 1]
    latencies = [column for column in shown if column.startswith(LATENCY)]
    removable = [SECONDS, PAPER_FLOPS, *others, MACS_RATIO, PARAMS_RATIO, *latencies, *second_metrics]
    if published:
        # Besides the parameters, the published models share no other measure of size with the runs.
        removable.sort(key=lambda column: column == PAPER_FLOPS)
    return removable


def fits(table: Table, console: Console) -> bool:
    """Whether the table fits without truncating or wrapping."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width


def _summary(table: pd.DataFrame, columns: list[str], left_out: list[str], is_sorted: bool) -> Table:
    macs, latencies = ([c for c in columns if c.startswith(prefix)] for prefix in (MACS, LATENCY))
    notes = [f"MACs at {', '.join(c.removeprefix('MACs ').strip('()') for c in macs)}"] if macs else []
    notes += ["paper FLOPs at 224×224"] if PAPER_FLOPS in columns else []
    notes += [f"latency: {c.removeprefix(LATENCY).strip(' ()')}" for c in latencies if c != LATENCY]
    notes += [f"only in the files: {', '.join(left_out)}"] if left_out else []
    result = new_table("; ".join(notes))
    # The files have a column for each image size; here they share one.
    columns = [c for c in columns if c not in macs[1:]]
    for column in columns:
        if column in ("run", "model"):
            width = {"overflow": "ellipsis", "max_width": 16 if is_sorted else 14} if column == "run" else {}
            result.add_column(column, no_wrap=True, **width)
        else:
            header = "MACs" if column in macs else "latency\nms" if column in latencies else column
            result.add_column(Text(_HEADERS.get(header, header)), justify="right", no_wrap=True, vertical="bottom")
    previous = None
    for row in table.to_dict("records"):
        starts_run = row["run"] != previous
        is_published = row["run"] == LABEL and not is_sorted and "model" in columns
        if starts_run and not is_sorted and (previous is not None or row["run"] == LABEL):
            result.add_section()
        if is_published and starts_run:
            label = Text(LABEL.replace(", ", ",\n"))
            result.add_row(*(label if column == "model" else "" for column in columns))
        cells = {column: _format(column, row[column]) for column in columns}
        if is_published or not (starts_run or is_sorted):
            cells["run"] = ""
        if macs:
            cells[macs[0]] = _format(macs[0], next((row[c] for c in macs if pd.notna(row[c])), pd.NA))
        result.add_row(*(Text(printable(cells[column])) for column in columns))
        previous = row["run"]
    return result


def _format(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOT_AVAILABLE
    if column in (PARAMS_RATIO, MACS_RATIO):
        return f"{value:.1%}"
    if column in ("params", PAPER_FLOPS) or column.startswith(MACS):
        return short_number(value)
    if column == SECONDS:
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    if column.startswith(LATENCY):
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    # A small metric must not be displayed as zero.
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}"


def new_table(caption: str = "") -> Table:
    """Return an empty table in the common style."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption=caption or None)
    table.caption_justify = "left"
    return table


def terminal_table(table: pd.DataFrame, with_run: bool, console: Console) -> Table:
    """Return a table no wider than the console, with numbers in full and without empty columns.

    A setting that is the same in all rows is in the caption, which also names the columns that do not fit.
    """
    columns = [
        c for c in table.columns if (c != "run" or with_run) and (table[c].notna() & (table[c].astype(str) != "")).any()
    ]
    same = [c for c in columns if c in _SETTINGS and len(table) > 1 and table[c].nunique(dropna=False) == 1]
    cells = dict(zip(table.columns, zip(*format_cells(table), strict=True), strict=True))
    numeric = dict(zip(table.columns, is_numeric(table), strict=True))
    # A mode says what it is: "size 64".
    notes = [cells[c][0] if c in ("mode", "form") else f"{c} {cells[c][0]}" for c in same]

    def build(shown: list[str], left_out: list[str]) -> Table:
        only = [f"only in the files: {', '.join(left_out)}"] if left_out else []
        result = new_table(printable("; ".join([*notes, *only])))
        for column in shown:
            # At a given width, the name is what may be folded.
            folds = not numeric[column] and column in shown[:2]
            align: dict[str, Any] = {"justify": "right" if numeric[column] else "left", "no_wrap": not folds}
            result.add_column(Text(printable(str(column))), **align, overflow="fold" if folds else "ellipsis")
        for row in zip(*(cells[column] for column in shown), strict=True):
            result.add_row(*(Text(printable(cell)) for cell in row))
        return result

    shown = [c for c in columns if c not in same]
    values = [c for c in shown if numeric[c] and c not in _SETTINGS and c != SECONDS]
    settings = [c for c in ("mode", "threads", "device", "size", "batch", "form") if c in shown]
    # The first value stays: the median, the first metric.
    return _fit(build, shown, [SECONDS, "peak MB", "skipped", "images", *values[:0:-1], *settings], console)


def terminal_layers(run: Run) -> Table:
    """Return a row for each layer: channels of its branches, the split, parameters and MACs, before → after."""
    size = format_size(run.layers_size or run.size).strip("()")
    table = new_table(f"channels of each branch, the finest first; split after slimming, in percent; MACs at {size}")
    table.add_column("layer", min_width=16, overflow="fold")
    for title in ("channels", "split", "params", "MACs"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer, rows in run.layers.groupby("layer", sort=False):
        channels, params, macs = ([rows[f"{q}_before"], rows[f"{q}_after"]] for q in ("channels", "params", "macs"))
        cells = [
            str(layer),
            " → ".join("+".join(NOT_AVAILABLE if pd.isna(n) else str(n) for n in counts) for counts in channels),
            _split(channels[1]) if len(rows) > 1 else "",
            *(" → ".join(compact_number(side.sum(skipna=False)) for side in sides) for sides in (params, macs)),
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _split(channels: pd.Series) -> str:
    """50:50, in percent; a dash where it is unknown or no channel is left."""
    total = channels.sum(skipna=False)
    if pd.isna(total) or not total:
        return NOT_AVAILABLE
    return ":".join(f"{100 * value / total:.0f}" for value in channels)
