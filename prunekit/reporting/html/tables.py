"""Tables of the page: what stands in each cell, and the number that it is sorted by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunekit.reporting.table_writers import cell
from prunekit.reporting.tables import Named

_TALL, _WIDE = 16, 8


@dataclass(frozen=True)
class Column:
    """``number``: it stands to the right and is sorted by value."""

    title: str
    number: bool


@dataclass(frozen=True)
class Cell:
    """``value``: the number in full, None where it is missing or where the cell is a text."""

    text: str
    value: str | None


@dataclass(frozen=True)
class PageTable:
    """A table ready for the page; ``tall`` and ``wide`` ones scroll in a box with their heads in sight."""

    title: str
    note: str
    columns: list[Column]
    rows: list[list[Cell]]
    tall: bool
    wide: bool


def page_table(named: Named, without: tuple[str, ...] = ()) -> PageTable:
    """A table of the report; the first column names the row. Columns that are empty all through go, and those in
    ``without``."""
    frame = named.table
    kept = [name for name in frame.columns if name not in without]
    kept = [name for index, name in enumerate(kept) if index == 0 or _holds(frame[name])]
    columns = [Column(str(name), _number(frame[name])) for name in kept]
    cells = [[_cell(value, column) for value in frame[name]] for name, column in zip(kept, columns, strict=True)]
    rows = [list(row) for row in zip(*cells, strict=True)]
    return PageTable(named.title, named.note, columns, rows, tall=len(rows) > _TALL, wide=len(columns) > _WIDE)


def _holds(column: pd.Series) -> bool:
    return bool((column.notna() & (column.astype(object) != "")).any())


def _number(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column))


def _cell(value: Any, column: Column) -> Cell:
    there = column.number and not pd.isna(value)
    return Cell(cell(value, column.title), repr(getattr(value, "item", lambda: value)()) if there else None)
