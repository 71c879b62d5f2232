"""Tables as files: raw numbers in CSV and JSON, written-out ones in Markdown and LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prunekit.reporting.number_format import written_out
from prunekit.utils.io import write_atomic

# A page holds no more rows than this; what is longer becomes a longtable.
PAGE_ROWS = 45
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"}, "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''", "`": r"\textasciigrave{}", "–": r"\textendash{}", "…": r"\dots{}", "×": r"$\times$", "÷": r"$\div$",
    "→": r"$\to$", "λ": r"$\lambda$", "γ": r"$\gamma$", "≤": r"$\le$", "≥": r"$\ge$", "·": r"$\cdot$", "²": r"$^2$",
}  # fmt: skip


def decimals(column: str) -> int:
    """How many digits stand behind the point in a column of fractions: 1 for seconds and megabytes, 3 for milliseconds,
    else 4."""
    if re.search(r"\bms\b", column):
        return 3
    return 1 if column == "seconds" or column.endswith((" s", " MB")) else 4


def cell(value: Any, column: str) -> str:
    """A value as people read it; a dash where there is none."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return written_out(value, decimals(column) if isinstance(value, (float, np.floating)) else None)


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write raw numbers, in UTF-8; what is missing is an empty field.

    Raises:
        CheckpointError: the system refused.
    """
    # A name can hold line breaks, and half a surrogate pair, which is no UTF-8.
    plain = table.map(lambda value: _CONTROL.sub(" ", value) if isinstance(value, str) else value)
    plain.columns = [_CONTROL.sub(" ", str(column)) for column in table.columns]
    write_atomic(path, plain.to_csv(index=False, lineterminator="\n").encode(errors="replace"))
    return path


def write_json(table: pd.DataFrame, path: Path) -> Path:
    """Write a list of rows, each a mapping from column to raw number or text; what is missing is null.

    Raises:
        CheckpointError: the system refused.
    """
    rows = [{str(c): _plain(v) for c, v in zip(table.columns, row, strict=True)} for row in _rows(table)]
    write_atomic(
        path, (json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")
    )
    return path


def write_markdown(table: pd.DataFrame, path: Path) -> Path:
    """Write numbers such as 210,985, right-aligned; what is missing is a dash.

    Raises:
        CheckpointError: the system refused.
    """
    heads = [_markdown(str(column)) for column in table.columns]
    rows = [
        [_markdown(cell(v, str(c))) for c, v in zip(table.columns, row, strict=True)] for row in _rows(table)
    ]  # fmt: skip
    right = [pd.api.types.is_numeric_dtype(table[column]) for column in table.columns]
    widths = [max(3, *(len(line[i]) for line in [heads, *rows])) for i in range(len(heads))]

    def line(cells: Iterable[str]) -> str:
        aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(aligned)} |"

    rule = [f"{'-' * (w + 1)}:" if r else f":{'-' * (w + 1)}" for w, r in zip(widths, right, strict=True)]
    text = "\n".join([line(heads), f"|{'|'.join(rule)}|", *map(line, rows)])
    write_atomic(path, f"{text}\n".encode(errors="replace"))
    return path


def _markdown(text: str) -> str:
    text = _CONTROL.sub(" ", text)
    return re.sub(r"([\\|`*_<\[])", r"\\\1", text) if not re.fullmatch(r"[\w .,%()×÷–+-]*", text) else text


def write_latex(table: pd.DataFrame, path: Path) -> Path:
    """Write a ``tabular`` with the rules of booktabs (a ``longtable`` where it is longer than a page), numbers as in
    Markdown; everything is escaped. A head's unit or convention stands in a second line.

    Raises:
        CheckpointError: the system refused.
    """
    long = len(table) > PAGE_ROWS
    columns = [str(column) for column in table.columns]
    right = [pd.api.types.is_numeric_dtype(table[column]) for column in table.columns]
    heads = [_head(column) for column in columns]
    head = [" & ".join(latex(upper) for upper, _ in heads) + r" \\"]
    if any(lower for _, lower in heads):
        head.append(" & ".join(latex(lower) for _, lower in heads) + r" \\")
    body = [" & ".join(latex(cell(v, c), n) for c, v, n in zip(columns, row, right, strict=True)) + r" \\"
            for row in _rows(table)]  # fmt: skip
    if "run" in columns and "model" in columns:
        _space_out(body, table["run"].tolist())
    kind = "longtable" if long else "tabular"
    lines = [
        f"% {path.stem}: needs \\usepackage{{booktabs}}" + (" and \\usepackage{longtable}" if long else ""),
        f"\\begin{{{kind}}}{{@{{}}{''.join('r' if r else 'l' for r in right)}@{{}}}}",
        r"\toprule",
        *head,
        r"\midrule",
        *([r"\endhead"] if long else []),
        *body,
        r"\bottomrule",
        f"\\end{{{kind}}}",
    ]
    write_atomic(path, ("\n".join(lines) + "\n").encode(errors="replace"))
    return path


def latex(text: str, number: bool = False) -> str:
    """A text that LaTeX prints as it is; letters beyond Latin need xelatex or lualatex."""
    # Two hyphens would be printed as a dash.
    text = "".join(_LATEX.get(sign, sign) for sign in _CONTROL.sub(" ", text)).replace("--", "-{}-")
    # At the start of a row "[" would be an argument of the line break before it.
    text = f"{{}}{text}" if text.startswith(("[", "*")) else text
    return f"$-${text[1:]}" if number and text.startswith("-") else text


def _head(column: str) -> tuple[str, str]:
    """MACs (64×64) → MACs, (64×64)."""
    found = re.fullmatch(r"(.+?) (\(.*\)|÷ dense|(?:before|after)(?: \(.*\))?)", column)
    return (found[1], found[2]) if found else (column, "")


def _space_out(body: list[str], names: list[str]) -> None:
    """A little space where the rows of another run begin."""
    for place in range(len(names) - 1, 0, -1):
        if names[place] != names[place - 1]:
            body.insert(place, r"\addlinespace")


def _rows(table: pd.DataFrame) -> Iterable[tuple[Any, ...]]:
    return zip(*(table.iloc[:, place].tolist() for place in range(table.shape[1])), strict=True)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool)):
        return value
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


WRITERS = {"csv": write_csv, "json": write_json, "md": write_markdown, "tex": write_latex}


def write_table(table: pd.DataFrame, stem: Path, narrow: list[str] | None = None) -> list[Path]:
    """Write ``<stem>.csv``, ``.json``, ``.md`` and ``.tex``, this with the ``narrow`` columns alone, and return their
    paths.

    Raises:
        CheckpointError: the system refused.
    """
    return [
        write(table if narrow is None or kind != "tex" else table[narrow], stem.with_name(f"{stem.name}.{kind}"))
        for kind, write in WRITERS.items()
    ]
