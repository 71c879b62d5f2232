"""Tables for a terminal, no wider than it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prunekit.reporting.columns import arrange_table
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import NOTHING, short_number, size_text
from prunekit.reporting.published import LABEL
from prunekit.reporting.table_writers import cell
from prunekit.reporting.tables import LATENCY, MACS, MACS_RATIO, PAPER_FLOPS, PARAMS_RATIO, SECONDS, summary_table

_SIZES = {"run", "model", "params", PAPER_FLOPS, PARAMS_RATIO, MACS_RATIO, SECONDS}
_HEADS = {
    PAPER_FLOPS: "paper\nFLOPs",
    "s_measure": "s_mea-\nsure",
    PARAMS_RATIO: "params\n÷dense",
    MACS_RATIO: "MACs\n÷dense",
}


def terminal_table(
    runs: Sequence[Run],
    console: Console,
    published: bool = False,
    columns: str | None = None,
    sort: str | None = None,
) -> Table:
    """The summary as a table no wider than the console; columns that do not fit are named below it.

    The published models stand in a section of their own, under a line that says what they are; where the rows are
    sorted, they are sorted in.

    Args:
        columns, sort: as for :func:`prunekit.reporting.columns.arrange_table`.
    """
    whole = summary_table(runs, published)
    table = arrange_table(whole, None, sort)
    asked = list(arrange_table(whole, columns, None).columns)
    some = [c for c in asked if c in ("run", "model") or columns is not None or table[c].notna().any()]
    if columns is None and len(runs) < 2 and not (published and sort):
        some.remove("run")
    shown, left_out = list(some), []
    # The files have every column; what goes first here is what the others nearly say. The first metric of each task
    # stays: models are compared by it.
    ranks = _ranks(table)
    least = sorted((c for c in ranks if ranks[c] > 1), key=lambda c: (-ranks[c], -some.index(c) if c in some else 0))
    seconds = [c for c in ranks if ranks[c] == 1]
    latencies = [c for c in some if c.startswith(LATENCY)]
    optional = [SECONDS, PAPER_FLOPS, *least, MACS_RATIO, PARAMS_RATIO, *latencies, *seconds]
    if published:
        # Of what says how large a model is, this and the parameters are all that the published ones share.
        optional.sort(key=lambda column: column == PAPER_FLOPS)
    if columns is not None:
        # Who names columns names the most wanted first.
        optional = list(reversed([c for c in some if c not in ("run", "model")][1:]))
    out = _summary(table, shown, left_out, sort is not None)
    for column in optional:
        if fits(out, console):
            break
        if column in shown:
            shown.remove(column)
            left_out.append(column)
            out = _summary(table, shown, left_out, sort is not None)
    return out


def fits(table: Table, console: Console) -> bool:
    """Whether nothing has to be cut or folded."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width


def _ranks(table: pd.DataFrame) -> dict[str, int]:
    """Metric → its best place (0 is the first) among those of any one model."""
    metrics = [c for c in table.columns if c not in _SIZES and not c.startswith((MACS, LATENCY))]
    ranks: dict[str, int] = {}
    for held in table[metrics].notna().to_numpy():
        for rank, metric in enumerate(m for m, there in zip(metrics, held, strict=True) if there):
            ranks[metric] = min(rank, ranks.get(metric, rank))
    return ranks


def _summary(table: pd.DataFrame, columns: list[str], left_out: list[str], is_sorted: bool) -> Table:
    macs = [c for c in columns if c.startswith(MACS)]
    latencies = [c for c in columns if c.startswith(LATENCY)]
    notes = [f"MACs at {', '.join(c.removeprefix('MACs ').strip('()') for c in macs)}"] if macs else []
    if PAPER_FLOPS in columns:
        notes.append("paper FLOPs at 224×224")
    notes += [f"latency: {c.removeprefix(LATENCY).strip(' ()')}" for c in latencies if c != LATENCY]
    if left_out:
        notes.append(f"in the files too: {', '.join(left_out)}")
    out = frame("; ".join(notes))
    # Runs counted at several sizes have a column each in the files; here they share one.
    columns = [c for c in columns if c not in macs[1:]]
    for column in columns:
        if column == "run":
            out.add_column("run", no_wrap=True, overflow="ellipsis", max_width=16 if is_sorted else 14)
        elif column == "model":
            out.add_column("model", no_wrap=True)
        else:
            head = "MACs" if column in macs else "latency\nms" if column in latencies else _HEADS.get(column, column)
            out.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    previous = None
    for _, row in table.iterrows():
        new = row["run"] != previous
        if not is_sorted and new and (previous is not None or row["run"] == LABEL):
            out.add_section()
        if not is_sorted and new and row["run"] == LABEL and "model" in columns:
            label = Text(LABEL.replace(", ", ",\n"))
            out.add_row(*(label if column == "model" else "" for column in columns))
        cells = []
        for column in columns:
            if column == "run":
                label = row["run"] if row["run"] != LABEL or is_sorted or "model" not in columns else ""
                cells.append(label if new or is_sorted else "")
            elif column in macs:
                cells.append(_cell(column, next((row[c] for c in macs if pd.notna(row[c])), pd.NA)))
            else:
                cells.append(_cell(column, row[column]))
        out.add_row(*(Text(plain(one)) for one in cells))
        previous = row["run"]
    return out


def _cell(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOTHING
    if column in (PARAMS_RATIO, MACS_RATIO):
        return f"{value:.1%}"
    if column == "params" or column.startswith(MACS) or column == PAPER_FLOPS:
        return short_number(value)
    if column == SECONDS:
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    if column.startswith(LATENCY):
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    # A figure far below 1 must not be shown as nothing.
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}"


def frame(caption: str = "") -> Table:
    """An empty table in the style of all of them."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption=caption or None)
    out.caption_justify = "left"
    return out


def listing(table: pd.DataFrame, console: Console, with_run: bool) -> Table:
    """A table whose numbers stand in full and whose texts fold where they must; without its empty columns."""
    columns = [
        c for c in table.columns if (c != "run" or with_run) and (table[c].notna() & (table[c].astype(str) != "")).any()
    ]
    out = frame()
    for column in columns:
        number = pd.api.types.is_numeric_dtype(table[column])
        out.add_column(Text(str(column)), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in table[columns].itertuples(index=False):
        out.add_row(*(Text(plain(cell(v, str(c)))) for c, v in zip(columns, row, strict=True)))
    return out


def layers_listing(run: Run) -> Table:
    """A row for each layer: channels of its branches, the split that is left, parameters and MACs, before → after."""
    out = frame(f"channels of each branch, the finest first; split after, in percent; MACs at {_size(run)}")
    for title in ("layer", "channels", "split", "params", "MACs"):
        if title == "layer":
            out.add_column(title, min_width=16, overflow="fold")
        else:
            out.add_column(title, justify="right", no_wrap=True)
    for layer, rows in run.layers.groupby("layer", sort=False):
        sides = {key: [rows[f"{key}_{when}"] for when in ("before", "after")] for key in ("channels", "params", "macs")}
        cells = [
            " → ".join("+".join(map(_count, side)) for side in sides["channels"]),
            _split(sides["channels"][1]) if len(rows) > 1 else "",
            *(" → ".join(_brief(side.sum(skipna=False)) for side in sides[key]) for key in ("params", "macs")),
        ]
        out.add_row(Text(plain(str(layer))), *map(Text, cells))
    return out


def _size(run: Run) -> str:
    return size_text(run.layers_size or run.size).strip("()")


def _count(value: Any) -> str:
    return NOTHING if pd.isna(value) else str(value)


def _brief(value: Any) -> str:
    """Three digits and no blank: 30.9k, 2.13M."""
    whole = short_number(value).replace(" ", "")
    return f"{value / 1000:.3g}k" if not pd.isna(value) and 9999.5 <= value < 999_500 else whole


def _split(channels: pd.Series) -> str:
    """50:50, in percent; a dash where it is unknown or nothing is left."""
    total = channels.sum(skipna=False)
    if pd.isna(total) or not total:
        return NOTHING
    return ":".join(f"{100 * value / total:.0f}" for value in channels)


def plain(text: str) -> str:
    """Without control characters, which could steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)
