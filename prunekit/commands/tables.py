"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def simple_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """A table with left-aligned and right-aligned columns, and a line under their titles."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for titles, justify, overflow in ((left, "left", "fold"), (right, "right", "ellipsis")):
        for title in titles:
            table.add_column(title, justify=justify, overflow=overflow, no_wrap=justify == "right")
    return table
