"""Where results of commands go: into the run folder or another one, and tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from prunekit.errors import RunFolderError
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import encode_json, write_atomic


def open_to_write(path: str | Path, out: Path | None) -> RunDir:
    """Open a run folder, locked unless results are written to another folder, ``out``."""
    if out is None and Path(path).is_dir() and not os.access(path, os.W_OK):
        raise RunFolderError(f"{path} cannot be written; give --out DIR for the results")
    return RunDir.open(path, write=out is None)


def write_result(run: RunDir, out: Path | None, name: str, content: Any) -> None:
    if out is None:
        run.write_json(name, content)
    else:
        write_atomic(out / name, encode_json(content, name))


def simple_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """A table with left-aligned and right-aligned columns, and a line under their titles."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for titles, justify, overflow in ((left, "left", "fold"), (right, "right", "ellipsis")):
        for title in titles:
            table.add_column(title, justify=justify, overflow=overflow, no_wrap=justify == "right")
    return table
