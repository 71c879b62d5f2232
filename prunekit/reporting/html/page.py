"""Render the report as one self-contained HTML page: no network, no other file, no script but its own.

Everything from a run folder is escaped, and the content security policy permits only the page's own script, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from prunekit import __version__
from prunekit.reporting.html.figures import EmbeddedFigure
from prunekit.reporting.html.sections import comparison_sections, lead, run_sections
from prunekit.reporting.loader import Run
from prunekit.reporting.tables import report_tables

# Control characters, surrogates and noncharacters are not valid in HTML; bidirectional controls could falsify text.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def render_page(runs: Sequence[Run], figures: Iterable[EmbeddedFigure], published: bool = False) -> str:
    """Return the report of runs as an HTML page.

    Args:
        runs: with distinct names, complete or not; with several, the page starts with a comparison.
        figures: from :func:`prunekit.reporting.html.figures.embed_figure`, in order.
        published: append the published CSNet models to the summary.

    Returns:
        HTML; the same for the same run folders.
    """
    figures, tables = list(figures), report_tables(runs, published)
    title, chapters = "Published models", []
    if len(runs) == 1:
        title = runs[0].name
        chapters.append(("all", "", "", list(run_sections(runs[0], "", tables, figures, published))))
    else:
        own = [[item for item in items if not item.run] for items in (tables, figures)]
        chapters.append(("all", "", "", list(comparison_sections(runs, *own))))
        title = f"{len(runs)} runs" if runs else title
        for index, run in enumerate(runs, 1):
            own = [[item for item in items if item.run == run.name] for items in (tables, figures)]
            sections = list(run_sections(run, f"run-{index}-", *own, published))
            chapters.append((f"run-{index}", run.name, lead(run), sections))
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        # Inline styles, of which SVG figures have many, cannot be permitted by a digest.
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        title=title,
        lead=lead(runs[0]) if len(runs) == 1 else "",
        version=__version__,
        style=Markup(_asset("page.css")),
        script=Markup(script),
        chapters=chapters,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_clean, keep_trailing_newline=True)
    return environment.from_string(_asset("page.html"))


def _clean(value: Any) -> Any:
    return value if isinstance(value, Markup) else _FORBIDDEN.sub("\ufffd", str(value))


@cache
def _asset(name: str) -> str:
    return files("prunekit.reporting.html").joinpath("assets", name).read_text("utf-8")
