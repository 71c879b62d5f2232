"""Render the report as one self-contained HTML page: no network, no other file, no script but its own.

Everything from a run folder is escaped, and the content security policy permits only the page's own script, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import ChainableUndefined, Environment, Template
from markupsafe import Markup

from prunekit import __version__
from prunekit.reporting.html.figures import EmbeddedFigure
from prunekit.reporting.loader import MODELS, Run
from prunekit.reporting.number_format import format_number, format_seconds, format_size, short_number
from prunekit.reporting.table_writers import format_cells, is_numeric
from prunekit.reporting.tables import ReportTable, differing_counters, report_tables

_MAX_RECIPE = 100_000  # characters
_TALL, _WIDE = 16, 8  # a table with more rows or columns scrolls in a box with its headers in sight
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters, surrogates and noncharacters are not valid in HTML; bidirectional controls could falsify text.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def render_page(
    runs: Sequence[Run],
    figures: Iterable[EmbeddedFigure],
    published: bool = False,
    links: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> str:
    """Return the report of runs as an HTML page; the same for the same run folders.

    Args:
        runs: with distinct names, complete or not; with several, the page starts with a comparison.
        figures: from :func:`prunekit.reporting.html.figures.embed_figure`, in order.
        published: append the published CSNet models to the summary.
        links: stem of a table or a figure → format and address of its files.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One run needs no column with its name, unless the published models are in the table too.
    hidden = ("run",) if len(runs) == 1 else ()
    tables = [
        page_table(table, () if published and table.name == "summary" else hidden)
        for table in report_tables(runs, published)
        if len(table.data) or len(runs) != 1
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs" if runs else "Published models"
    return _template().render(
        # Inline styles, of which SVG figures have many, cannot be permitted by a digest.
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        title=title,
        runs=runs,
        tables=tables,
        figures=list(figures),
        links=links or {},
        models=MODELS,
        version=__version__,
        max_recipe=_MAX_RECIPE,
        style=Markup(_asset("page.css")),
        script=Markup(script),
    )


def page_table(table: ReportTable, hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """Prepare a table for the template: each cell with its text and, to sort by, its raw number.

    The first column names the row. Hidden and empty columns are left out.
    """
    data, note = table.data.drop(columns=[name for name in hidden if name in table.data]), table.note
    if table.name == "counters":
        data, agreeing = differing_counters(data)
        note = f"{', '.join(agreeing)} agree with prunekit everywhere." if agreeing else note
    data = data[[c for i, c in enumerate(data) if not i or (data[c].notna() & (data[c].astype(object) != "")).any()]]
    numeric = is_numeric(data)
    values = zip(*(data[column].tolist() for column in data), strict=True)
    rows = [
        [(text, None if not number or pd.isna(value) else value) for text, value, number in zip(*row, strict=True)]
        for row in ((texts, raw, numeric) for texts, raw in zip(format_cells(data), values, strict=True))
    ]
    return {
        "name": table.name,
        "run": table.run,
        "title": table.title,
        "note": "" if table.name == "summary" else note,
        "stem": table.stem,
        "columns": list(zip(map(str, data.columns), numeric, strict=True)),
        "rows": rows,
        "tall": len(rows) > _TALL,
        "wide": len(numeric) > _WIDE,
    }


# ---- filters of the template


def _lead(run: Run) -> str:
    """Describe the run: "A csnet for saliency on …", and whether it is complete."""
    backbone, data, task = (_name(run.recipe.get(key)) for key in ("backbone", "data", "task"))
    words = [
        f"A {backbone or 'network'}",
        f" for {task}" if task else "",
        f" on {data}" if data else "",
        f" at {run.size[0]}×{run.size[1]} pixels" if run.size else "",
    ]
    states = {"complete": "The run is complete", "unknown": "The status of the run is unknown"}
    return f"{''.join(words)}. {states.get(run.status, f'The run is not complete: {run.status}')}."


def _name(section: Any) -> str | None:
    name = section.get("name") if isinstance(section, dict) else section
    return name if isinstance(name, str) else None


def _last_model(run: Run) -> str:
    return next((name for name in ("finetuned", "slim") if run.model(name)), "dense")


def _reference(run: Run) -> list[dict[str, Any]]:
    """Return the table of the trivial predictors, if any."""
    reference = run.summary.get("reference", {})
    known = {name: {k: v for k, v in metrics.items() if v is not None} for name, metrics in reference.items()}
    rows = [{"predictor": str(name), **metrics} for name, metrics in known.items() if metrics]
    note = "Metrics of predictors that ignore the image, or most of it, on the same data."
    return [page_table(ReportTable("reference", "Trivial predictors", note, pd.DataFrame(rows)))] if rows else []


def _recipe(run: Run) -> str:
    try:
        return (run.path / "recipe.yaml").read_text("utf-8", "replace")
    except OSError:
        return ""


def _difference(value: float) -> str:
    return _power(value, 3) if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _power(value: float, digits: int = 2) -> str:
    """``1.6×10⁻¹⁵``, which no line break can split."""
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}×10{f'{int(exponent)}'.translate(_SUPERSCRIPTS)}" if value else "0"


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=ChainableUndefined, finalize=_clean, keep_trailing_newline=True
    )
    environment.filters |= {
        "number": format_number, "short": short_number, "percent": "{:.1%}".format, "power": _power,
        "difference": _difference, "duration": format_seconds, "size": format_size, "lead": _lead,
        "last_model": _last_model, "reference": _reference, "recipe": _recipe,
    }  # fmt: skip
    return environment.from_string(_asset("page.html"))


def _clean(value: Any) -> Any:
    return value if isinstance(value, Markup) else _FORBIDDEN.sub("\ufffd", str(value))


@cache
def _asset(name: str) -> str:
    return files("prunekit.reporting.html").joinpath("assets", name).read_text("utf-8")
