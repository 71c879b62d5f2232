"""The columns and the order of rows that the command line asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from prunekit.config.registry import closest_match
from prunekit.errors import PrunekitError


def arrange_table(table: pd.DataFrame, columns: str | None, sort: str | None) -> pd.DataFrame:
    """The table with these columns, in this order, and its rows sorted.

    Args:
        table: the summary.
        columns: names, separated by commas: as in the table's heads, or shorter (see :func:`find`); None: all.
        sort: names, separated by commas, the first one first; one that begins with "-" sorts from the largest down.
            What is missing comes last, and rows that are equal keep their order. None: no sorting.

    Raises:
        PrunekitError: there is no such column.
    """
    # Both are looked up in the whole table, and before anything is changed.
    chosen = (
        [c for name in _names("--columns", columns) for c in find(table, name, "--columns")]
        if columns is not None
        else None
    )
    keys = [
        (find(table, name.removeprefix("-"), "--sort"), name.startswith("-")) for name in _names("--sort", sort)
    ] if sort is not None else []  # fmt: skip
    # Sorted by the last key first: each sort keeps the order of the one before among equals.
    for found, descending in reversed(keys):
        values = table[found[0]]
        for other in found[1:]:
            values = values.combine_first(table[other])
        if not pd.api.types.is_numeric_dtype(values):
            values = values.map(lambda value: value.casefold() if isinstance(value, str) else value)
        order = values.reset_index(drop=True).sort_values(ascending=not descending, kind="stable", na_position="last")
        table = table.iloc[order.index]
    table = table.reset_index(drop=True)
    return table if chosen is None else table[list(dict.fromkeys(chosen))]


def find(table: pd.DataFrame, name: str, option: str) -> list[str]:
    """The columns of this name. Capitals do not count, nor does what stands in brackets, so that "macs" stands for all
    columns "MACs (…)"; "params_ratio" and "macs_ratio", as ``summary.json`` has them, are "params ÷ dense" and
    "MACs ÷ dense".

    Raises:
        PrunekitError: there is none; the message has the nearest.
    """
    columns = [str(column) for column in table.columns]
    for form in (str, str.casefold, _bare):
        found = [column for column in columns if form(column) == form(name)]
        if found:
            return found
    simple = {_bare(column): re.sub(r" \(.*\)$", "", column) for column in columns}
    near = closest_match(_bare(name), list(simple))
    meant = f", did you mean {simple[near]!r}?" if near else ""
    raise PrunekitError(
        f"{option} {name}: no such column{meant} (there are {', '.join(dict.fromkeys(simple.values()))})"
    )


def _bare(name: str) -> str:
    return re.sub(r"[\W_]+", "", re.sub(r" \(.*\)$", "", name).replace("÷ dense", "ratio").casefold()) or name


def _names(option: str, text: str) -> Sequence[Any]:
    # Not at a comma in brackets: "latency ms (onnx, batch 1)" is one name.
    names = [name.strip() for name in re.split(r",(?![^()]*\))", text)]
    if not all(name.removeprefix("-") for name in names):
        raise PrunekitError(f"{option} {text!r}: a name is empty; give names such as run,model,params")
    return names
