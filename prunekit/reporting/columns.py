"""What the columns of a summary mean, and their selection and order as requested on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from prunekit.errors import PrunekitError
from prunekit.utils.text import closest_match


class Metric(NamedTuple):
    """How a metric is called in axes and in narrow tables; ``scale`` is 100 where those tables show percent."""

    title: str
    short: str
    lower_is_better: bool = False
    scale: int = 1


_METRICS = {
    "max_f": Metric("max F-measure", "max F"),
    "mae": Metric("mean absolute error", "MAE", True),
    "s_measure": Metric("S-measure", "S"),
    "max_e": Metric("max E-measure", "max E"),
    "top1": Metric("top-1 accuracy", "top-1", scale=100),
    "top5": Metric("top-5 accuracy", "top-5", scale=100),
    **{name: Metric(name, name, True) for name in ("mse", "rmse", "error", "loss")},
}


def metric(name: str) -> Metric:
    """Return what is known about a metric; higher is better for one that is not known."""
    return _METRICS.get(name, Metric(name, name))


def arrange_table(table: pd.DataFrame, columns: str | None, sort: str | None) -> pd.DataFrame:
    """Return the table with the given columns, in that order, and its rows sorted.

    Args:
        table: the summary.
        columns: comma-separated column names, see :func:`find_columns`; None: all.
        sort: comma-separated column names, most significant first; a leading "-" sorts in descending order. Missing
            values come last, the sort is stable. None: no sorting.

    Raises:
        PrunekitError: there is no such column.
    """
    # All names are resolved before anything is changed.
    selected = [c for name in _split(columns, "--columns") for c in find_columns(table, name, "--columns")]
    keys = [
        (find_columns(table, name.removeprefix("-"), "--sort"), name.startswith("-")) for name in _split(sort, "--sort")
    ]
    # Least significant key first: stable sorts preserve the order of the previous ones.
    for (first, *others), descending in reversed(keys):
        values = table[first]
        for other in others:
            values = values.combine_first(table[other])
        if not pd.api.types.is_numeric_dtype(values):
            values = values.map(lambda value: value.casefold() if isinstance(value, str) else value)
        order = values.reset_index(drop=True).sort_values(ascending=not descending, kind="stable", na_position="last")
        table = table.iloc[order.index]
    table = table.reset_index(drop=True)
    return table if columns is None else table[list(dict.fromkeys(selected))]


def find_columns(table: pd.DataFrame, name: str, option: str) -> list[str]:
    """Return the columns with a name.

    Case and parts in brackets are ignored: "macs" matches all columns "MACs (…)". The keys of ``summary.json``,
    "params_ratio" and "macs_ratio", match "params ÷ dense" and "MACs ÷ dense".

    Raises:
        PrunekitError: there is none; the message suggests the nearest.
    """
    columns = [str(column) for column in table.columns]
    for normalize in (str, str.casefold, _simplify):
        matches = [column for column in columns if normalize(column) == normalize(name)]
        if matches:
            return matches
    titles = {_simplify(column): re.sub(r" \(.*\)$", "", column) for column in columns}
    closest = closest_match(_simplify(name), list(titles))
    hint = f", did you mean {titles[closest]!r}?" if closest else ""
    raise PrunekitError(
        f"{option} {name}: no such column{hint} (choose from {', '.join(dict.fromkeys(titles.values()))})"
    )


def _simplify(name: str) -> str:
    return re.sub(r"[\W_]+", "", re.sub(r" \(.*\)$", "", name).replace("÷ dense", "ratio").casefold()) or name


def _split(text: str | None, option: str) -> Sequence[str]:
    if text is None:
        return []
    # Not at a comma in brackets: "latency ms (onnx, batch 1)" is one name.
    names = [name.strip() for name in re.split(r",(?![^()]*\))", text)]
    if not all(name.removeprefix("-") for name in names):
        raise PrunekitError(f"{option} {text!r}: a name is empty; use names such as run,model,params")
    return names
