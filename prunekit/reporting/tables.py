"""Tables of runs: raw numbers for CSV, written-out ones for Markdown, short ones for the terminal.

A header names its unit and convention: MACs count one multiply-add as one, on an image of the size that stands there;
"paper FLOPs" are the convention of the CSNet paper and always at 224×224; "÷ dense" is the ratio to the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prunekit.files import write_atomic
from prunekit.reporting.load import COUNTERS, PARTS, Run
from prunekit.reporting.published import LABEL, PUBLISHED

PAPER_FLOPS = "paper FLOPs (224×224)"
PARAMS_RATIO, MACS_RATIO = "params ÷ dense", "MACs ÷ dense"
NOTHING = "–"
_TITLES = {
    "channels": "channels {}",
    "params": "params {}",
    "macs": "MACs {} {}",
    "fvcore_macs": "fvcore MACs {} {}",
    "thop_macs": "thop MACs {} {}",
    "paper_flops": "paper FLOPs {} (224×224)",
}


def size_text(size: tuple[int, int] | None) -> str:
    """``(64×64)``, height before width, or ``(size unknown)``."""
    return f"({size[0]}×{size[1]})" if size else "(size unknown)"


def macs_title(run: Run) -> str:
    """The header of a column of MACs."""
    return f"MACs {size_text(run.size)}"


def summary_table(runs: Sequence[Run], published: bool = False) -> pd.DataFrame:
    """A row for each run and model (baseline, dense, slim, finetuned) that is there; with ``published`` one for each
    published CSNet below them, whose run is called "published, ECSSD".

    Columns: run, model, params, MACs (one column for each image size), paper FLOPs, the metrics that the runs hold, in
    their order there, and params and MACs as ratios to the dense model of the same run. What is not known is missing
    (NA), such as the metrics of another run's task.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        dense = _part(run, "dense")
        for name in PARTS:
            part = _part(run, name)
            if not part:
                continue
            metrics = part.get("metrics") or {}
            rows.append(
                {
                    "run": run.name,
                    "model": name,
                    "params": part.get("params"),
                    macs_title(run): part.get("macs"),
                    PAPER_FLOPS: part.get("paper_flops"),
                    **{key: value for key, value in metrics.items() if _is_number(value)},
                    PARAMS_RATIO: _ratio(part.get("params"), dense.get("params")),
                    MACS_RATIO: _ratio(part.get("macs"), dense.get("macs")),
                }
            )
    for one in PUBLISHED if published else ():
        sizes = {"params": one.params, PAPER_FLOPS: one.paper_flops}
        rows.append({"run": LABEL, "model": one.name, **sizes, **one.metrics})
    found = list(dict.fromkeys(key for row in rows for key in row))
    macs = [key for key in found if key.startswith("MACs (")]
    first = ["run", "model", "params", *macs, PAPER_FLOPS]
    last = [PARAMS_RATIO, MACS_RATIO]
    metrics = [key for key in found if key not in {*first, *last}]
    counts = dict.fromkeys(["params", *macs, PAPER_FLOPS], "Int64")
    table = pd.DataFrame(rows, columns=[*first, *metrics, *last])
    return table.astype({**counts, **dict.fromkeys([*metrics, *last], "Float64")})


def layers_table(run: Run) -> pd.DataFrame:
    """A row for each layer and branch, in the order of the network; every count before and after slimming."""
    table = run.layers[["layer", "branch"]].copy()
    for quantity, title in _TITLES.items():
        for when in ("before", "after"):
            table[title.format(when, size_text(run.size))] = run.layers[f"{quantity}_{when}"]
    return table


def counters_table(run: Run) -> pd.DataFrame:
    """Params and MACs of the dense and the slim model as each counter has them, and a note wherever they differ.

    Columns: model, quantity, ours, fvcore, thop, torch, note. A counter that does not give a quantity is missing
    (NA) and does not count as differing.
    """
    rows = []
    for model in dict.fromkeys(run.counters["model"]):
        counted = run.counters[run.counters["model"] == model].set_index("counter")
        for quantity, title in (("params", "params"), ("macs", macs_title(run))):
            values = {name: counted[quantity].get(name, pd.NA) for name in COUNTERS}
            rows.append({"model": model, "quantity": title, **values, "note": _differences(values)})
    table = pd.DataFrame(rows, columns=["model", "quantity", *COUNTERS, "note"])
    return table.assign(**{name: pd.to_numeric(table[name]).convert_dtypes() for name in COUNTERS})


def _differences(values: dict[str, Any]) -> str:
    ours = values["ours"]
    if pd.isna(ours):
        return "ours is missing"
    notes = []
    for name, value in values.items():
        if name == "ours" or pd.isna(value) or value == ours:
            continue
        percent = 100 * (value - ours) / ours if ours else 0.0
        share = f" ({percent:{'+,.0f' if abs(percent) >= 100 else '+.2g'}} %)" if ours else ""
        notes.append(f"{name} {value - ours:+,}{share}")
    return "; ".join(notes)


def _part(run: Run, name: str) -> dict[str, Any]:
    part = run.summary.get(name)
    return part if isinstance(part, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ratio(value: Any, dense: Any) -> float | None:
    return value / dense if _is_number(value) and _is_number(dense) and dense else None


# ---- files


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write raw numbers, in UTF-8; what is missing is an empty field.

    Raises:
        CheckpointError: the system refused.
    """
    write_atomic(path, table.to_csv(index=False, lineterminator="\n").encode())
    return path


def write_markdown(table: pd.DataFrame, path: Path) -> Path:
    """Write numbers such as 210,985, right-aligned; what is missing is a dash.

    Raises:
        CheckpointError: the system refused.
    """
    shown = pd.DataFrame(
        {str(c): [written_out(v, _is_float(table[c])).replace("|", "\\|") for v in table[c]] for c in table.columns}
    )
    align = ["right" if pd.api.types.is_numeric_dtype(table[c]) else "left" for c in table.columns]
    text = shown.to_markdown(index=False, colalign=align if len(shown) else None, disable_numparse=True)
    write_atomic(path, f"{text}\n".encode())
    return path


def written_out(value: Any, fraction: bool = False) -> str:
    """A number in full: 210,985, or with ``fraction`` 0.8123; a dash where there is none; a text as it is."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOTHING
    return f"{value:,.4f}" if fraction else f"{value:,}"


def _is_float(column: pd.Series) -> bool:
    return pd.api.types.is_float_dtype(column)


def short(value: Any) -> str:
    """A number in few characters: 210,985, then 35.3 M and 6.11 G; a dash where there is none."""
    if pd.isna(value):
        return NOTHING
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        # 999,950 would round to 1000.0 of the smaller unit.
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {unit}" if abs(value) < 999.5 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:,.0f}"


# ---- terminal


def terminal_table(runs: Sequence[Run], console: Console, published: bool = False) -> Table:
    """The summary as a table no wider than the console; columns that do not fit are named below it.

    The published models stand in a section of their own, under a line that says what they are.
    """
    table = summary_table(runs, published)
    columns = [c for c in table.columns if c not in ("run", "model") and table[c].notna().any()]
    # The files have every column; what goes first here is what the others nearly say. The first metric of each task
    # stays: models are compared by it.
    ranks = _ranks(table)
    least = sorted((c for c in ranks if ranks[c] > 1), key=lambda c: (-ranks[c], -columns.index(c)))
    seconds = [c for c in ranks if ranks[c] == 1]
    optional = [PAPER_FLOPS, *least, MACS_RATIO, PARAMS_RATIO, *seconds]
    if published:
        # Of what says how large a model is, this and the parameters are all that the published ones share.
        optional.sort(key=lambda column: column == PAPER_FLOPS)
    left_out: list[str] = []
    shown = _rich(table, columns, runs, left_out, published)
    for column in optional:
        if Measurement.get(console, console.options.update(width=10_000), shown).maximum <= console.width:
            break
        if column in columns:
            columns.remove(column)
            left_out.append(column)
            shown = _rich(table, columns, runs, left_out, published)
    return shown


def _ranks(table: pd.DataFrame) -> dict[str, int]:
    """Metric → its best place (0 is the first) among those of any one model."""
    sizes = {"run", "model", "params", PAPER_FLOPS, PARAMS_RATIO, MACS_RATIO}
    metrics = [c for c in table.columns if c not in sizes and not c.startswith("MACs (")]
    ranks: dict[str, int] = {}
    for held in table[metrics].notna().to_numpy():
        for rank, metric in enumerate(m for m, there in zip(metrics, held, strict=True) if there):
            ranks[metric] = min(rank, ranks.get(metric, rank))
    return ranks


def _rich(table: pd.DataFrame, columns: list[str], runs: Sequence[Run], left_out: list[str], published: bool) -> Table:
    macs = [c for c in columns if c.startswith("MACs (")]
    sizes = ", ".join(c.removeprefix("MACs ").strip("()") for c in macs)
    notes = [f"MACs at {sizes}"] if macs else []
    if PAPER_FLOPS in columns:
        notes.append("paper FLOPs at 224×224")
    if left_out:
        notes.append(f"in the files too: {', '.join(left_out)}")
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, caption="; ".join(notes))
    out.caption_justify = "left"
    several = len(runs) > 1
    if several:
        out.add_column("run", no_wrap=True, overflow="ellipsis", max_width=14)
    out.add_column("model", no_wrap=True)
    heads = {
        PAPER_FLOPS: "paper\nFLOPs",
        "s_measure": "s_mea-\nsure",
        PARAMS_RATIO: "params\n÷dense",
        MACS_RATIO: "MACs\n÷dense",
    }
    for column in [c for c in columns if c not in macs[1:]]:
        head = "MACs" if column in macs else heads.get(column, column)
        out.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    previous = None
    last = len(table) - len(PUBLISHED) if published else len(table)
    for index, row in table.iterrows():
        if index == last:
            out.add_section()
            out.add_row(Text(LABEL.replace(", ", ",\n")))
            previous = LABEL
        cells = [row["run"] if row["run"] != previous else ""] if several else []
        cells.append(row["model"])
        for column in [c for c in columns if c not in macs[1:]]:
            # Runs counted at several sizes have a column each in the files; here they share one.
            value = next((row[c] for c in macs if pd.notna(row[c])), pd.NA) if column in macs else row[column]
            cells.append(_cell(column, value))
        if several and previous is not None and row["run"] != previous:
            out.add_section()
        out.add_row(*(Text(str(cell)) for cell in cells))
        previous = row["run"]
    return out


def _cell(column: str, value: Any) -> str:
    if pd.isna(value):
        return NOTHING
    if column in (PARAMS_RATIO, MACS_RATIO):
        return f"{value:.1%}"
    return (
        short(value) if column == "params" or column.startswith("MACs (") or column == PAPER_FLOPS else f"{value:.3f}"
    )
