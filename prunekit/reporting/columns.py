"""Select and sort the columns of the summary as requested on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from prunekit.config.registry import closest_match
from prunekit.errors import PrunekitError


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
