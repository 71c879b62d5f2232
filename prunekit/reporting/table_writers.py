"""Write tables as files: raw numbers in CSV and JSON, formatted ones in Markdown and LaTeX.

All functions raise CheckpointError if a file cannot be written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from prunekit.reporting.columns import metric
from prunekit.reporting.number_format import compact_number, format_number
from prunekit.utils.io import write_atomic

PAGE_ROWS = 45  # a longer table becomes a longtable
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"}, "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''", "`": r"\textasciigrave{}", "–": r"\textendash{}", "…": r"\dots{}", "×": r"$\times$", "÷": r"$\div$",
    "→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "λ": r"$\lambda$", "γ": r"$\gamma$", "≤": r"$\le$", "≥": r"$\ge$", "·": r"$\cdot$",
    "²": r"$^2$",
}  # fmt: skip


def decimals(column: str) -> int:
    """Return the decimals of fractions in a column: 1 for seconds and megabytes, 3 for milliseconds, else 4."""
    if re.search(r"\bms\b", column):
        return 3
    return 1 if column == "seconds" or column.endswith((" s", " MB")) else 4


def format_cell(value: Any, column: str) -> str:
    """Format a value for readers; a missing one is a dash."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return format_number(value, decimals(column) if isinstance(value, (float, np.floating)) else None)


def is_numeric(table: pd.DataFrame) -> list[bool]:
    """Return for each column whether it contains numbers, which are right-aligned."""
    return [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]


def format_cells(table: pd.DataFrame) -> list[list[str]]:
    """Return the rows as formatted texts."""
    columns = [[format_cell(value, str(name)) for value in column.tolist()] for name, column in table.items()]
    return [list(row) for row in zip(*columns, strict=True)]


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write raw numbers in UTF-8; missing values are empty fields."""
    # Names may contain line breaks.
    plain = table.map(lambda value: _CONTROL.sub(" ", value) if isinstance(value, str) else value)
    plain.columns = [_CONTROL.sub(" ", str(column)) for column in table.columns]
    return _write(path, plain.to_csv(index=False, lineterminator="\n"))


def write_json(table: pd.DataFrame, path: Path) -> Path:
    """Write a list of rows, each a mapping from column to raw number or text; missing values are null."""
    # Not DataFrame.to_json, which rounds to 15 digits.
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return _write(path, json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_markdown(table: pd.DataFrame, path: Path) -> Path:
    """Write formatted numbers such as 210,985, right-aligned; missing values are dashes."""
    headers = [_escape_markdown(str(column)) for column in table.columns]
    rows = [list(map(_escape_markdown, row)) for row in format_cells(table)]
    align = ["right" if numeric else "left" for numeric in is_numeric(table)]
    text = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align if rows else None)
    return _write(path, f"{text}\n")


def _escape_markdown(text: str) -> str:
    text = _CONTROL.sub(" ", text)
    return re.sub(r"([\\|`*_<\[])", r"\\\1", text) if not re.fullmatch(r"[\w .,%()×÷–+-]*", text) else text


def write_latex(table: pd.DataFrame, path: Path, narrow: bool = False) -> Path:
    """Write a booktabs ``tabular``, or a ``longtable`` beyond a page, with numbers as in Markdown and texts escaped.

    The unit or convention of a header is in a second line. ``narrow`` is for a summary in one column of a paper: three
    digits (73.3k), percent, short names of metrics with an arrow to the better side, and their best values in bold.
    """
    macs = [column for column in table if str(column).startswith("MACs (")]
    if narrow and len(macs) > 1:
        # Sizes differ by run, which has no room for a column of each.
        merged = table[macs].bfill(axis=1)[macs[0]].astype("Int64")
        table = table.drop(columns=macs[1:]).assign(**{macs[0]: merged}).rename(columns={macs[0]: "MACs"})
    kind = "longtable" if len(table) > PAGE_ROWS else "tabular"
    numeric = is_numeric(table)
    titles, cells = list(map(str, table.columns)), format_cells(table)
    best: set[tuple[int, int]] = set()
    if narrow:
        titles, cells, best = _narrow(table)
    headers = list(zip(*map(_split_header, titles), strict=True))
    lines = [
        f"% {path.stem}: needs \\usepackage{{booktabs}}" + (" and \\usepackage{longtable}" * (kind == "longtable")),
        f"\\begin{{{kind}}}{{@{{}}{''.join('r' if right else 'l' for right in numeric)}@{{}}}}",
        r"\toprule",
        *(" & ".join(map(escape_latex, line)) + r" \\" for line in headers if any(line)),
        r"\midrule",
        *([r"\endhead"] if kind == "longtable" else []),
    ]
    names = table["run"].tolist() if {"run", "model"} <= set(table.columns) else [""] * len(table)
    for index, row in enumerate(cells):
        if index and names[index] != names[index - 1]:
            lines.append(r"\addlinespace")
        texts = map(escape_latex, row, numeric)
        texts = (rf"\textbf{{{text}}}" if (index, column) in best else text for column, text in enumerate(texts))
        lines.append(" & ".join(texts) + r" \\")
    if narrow:
        lines = [lines[0], r"{\small\setlength{\tabcolsep}{4pt}", *lines[1:]]
    end = f"\\end{{{kind}}}{'}' if narrow else ''}"
    return _write(path, "\n".join([*lines, r"\bottomrule", end]) + "\n")


def _narrow(table: pd.DataFrame) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Return titles, cells, and the (row, column) of the best value of each metric."""
    titles, columns, best = [], [], set()
    for place, (name, values) in enumerate(table.items()):
        raw = values.tolist()
        if not pd.api.types.is_numeric_dtype(values.dtype):
            titles.append(str(name))
            columns.append([{"finetuned": "fine-tuned"}.get(text, format_cell(text, "")) for text in raw])
        elif pd.api.types.is_integer_dtype(values.dtype):
            titles.append(str(name))
            columns.append(list(map(compact_number, raw)))
        elif str(name).endswith("÷ dense"):
            titles.append(f"{str(name).removesuffix(' ÷ dense')} (%)")
            columns.append([format_number(value if pd.isna(value) else 100 * value, 1) for value in raw])
        elif re.search(r"\bms\b|^seconds$", str(name)):
            titles.append(str(name))
            columns.append([format_cell(value, str(name)) for value in raw])
        else:
            known = metric(str(name).removeprefix("metrics."))
            titles.append(f"{known.short} {'↓' if known.lower_is_better else '↑'}{' (%)' if known.scale > 1 else ''}")
            digits = 1 if known.scale > 1 else 3
            columns.append([format_number(v if pd.isna(v) else known.scale * v, digits) for v in raw])
            top = values.min() if known.lower_is_better else values.max()
            if values.dropna().nunique() > 1:
                best |= {(row, place) for row, value in enumerate(raw) if not pd.isna(value) and value == top}
    return titles, [list(row) for row in zip(*columns, strict=True)], best


def escape_latex(text: str, number: bool = False) -> str:
    """Escape a text for LaTeX; letters beyond Latin need xelatex or lualatex."""
    # Two hyphens would be printed as a dash.
    text = "".join(_LATEX.get(sign, sign) for sign in _CONTROL.sub(" ", text)).replace("--", "-{}-")
    # At the start of a row "[" would be an argument of the previous line break.
    text = f"{{}}{text}" if text.startswith(("[", "*")) else text
    return f"$-${text[1:]}" if number and text.startswith("-") else text


def _split_header(column: str) -> tuple[str, str]:
    """Split the unit off: "MACs (64×64)" → "MACs", "(64×64)"."""
    match = re.fullmatch(r"(.+?) (\(.*\)|÷ dense|(?:before|after)(?: \(.*\))?)", column)
    return (match[1], match[2]) if match else (column, "")


def _write(path: Path, text: str) -> Path:
    # A name may contain half a surrogate pair, which UTF-8 cannot encode.
    write_atomic(path, text.encode(errors="replace"))
    return path


def write_table(
    table: pd.DataFrame, stem: Path, latex_columns: list[str] | None = None, narrow: bool = False
) -> list[Path]:
    """Write ``<stem>.csv``, ``.json``, ``.md`` and ``.tex`` (with ``latex_columns`` only), and return the paths."""
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("csv", "json", "md", "tex")}
    write_latex(table[latex_columns] if latex_columns else table, paths["tex"], narrow)
    return [
        write_csv(table, paths["csv"]),
        write_json(table, paths["json"]),
        write_markdown(table, paths["md"]),
        paths["tex"],
    ]
