"""The report as one HTML page that needs nothing else: no network, no other file, no script but its own.

Everything that comes from a run folder is escaped, and the page's content security policy lets nothing run but the one
script whose digest it names.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from prunekit import __version__
from prunekit.reporting.html.figures import Illustration, illustrate
from prunekit.reporting.html.run_section import Section, in_words, lead, run_sections
from prunekit.reporting.html.tables import page_table
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import file_stem
from prunekit.reporting.tables import Named, tables

__all__ = ["Illustration", "illustrate", "page"]

# Control characters and halves of surrogate pairs are no text that a page may hold; signs that turn the direction of
# writing around could make it say what it does not.
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


_Named = TypeVar("_Named", Illustration, Named)


@dataclass(frozen=True)
class Chapter:
    """Sections about all runs, then (with a title) about each of several."""

    id: str
    title: str
    lead: str
    sections: list[Section]


def page(runs: Sequence[Run], illustrations: Iterable[Illustration], published: bool = False) -> str:
    """The report of these runs as a page.

    Args:
        runs: of distinct names, complete or not; with several the page begins with what sets them side by side.
        illustrations: the figures, in their order, each from :func:`illustrate`.
        published: put the published CSNet models below the runs.

    Returns:
        HTML, the same for the same run folders. Without a script or a mark from the run folders: all text is escaped.
    """
    drawings, named = _sorted_out(runs, list(illustrations)), _sorted_out(runs, tables(runs, published))
    chapters = []
    if len(runs) == 1:
        sections = run_sections(runs[0], "", _by_stem(named[0]), drawings[0], alone=not published)
        chapters.append(Chapter("all", "", "", list(sections)))
    else:
        chapters.append(Chapter("all", "", "", list(_side_by_side(runs, _by_stem(named[-1]), drawings[-1]))))
        for index, run in enumerate(runs):
            own = _by_stem(named[index], f"{file_stem(run.name)}-")
            sections = run_sections(run, f"run-{index + 1}-", own, drawings[index], alone=False)
            chapters.append(Chapter(f"run-{index + 1}", run.name, lead(run), list(sections)))
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        # Styles of single elements cannot be named by a digest: the SVG figures are full of them.
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        title=_title(runs),
        lead=_lead(runs),
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        chapters=chapters,
    )


def _side_by_side(
    runs: Sequence[Run], named: Mapping[str, Named], drawings: Sequence[Illustration]
) -> Iterator[Section]:
    models = page_table(named["summary"])
    words = [f"{run.name}: {in_words(run)}" for run in runs if "dense" in run.summary]
    unfinished = [f"{run.name}: not complete ({run.status})" for run in runs if run.status != "complete"]
    nothing = [] if models.rows else ["No model has been measured yet."]
    held = [replace(models, note="")] if models.rows else []
    yield Section("summary", "Summary", nothing, items=words, missing=unfinished, tables=held)
    if drawings:
        yield Section("figures", "Figures", drawings=drawings)
    for stem, one in named.items():
        # The notes stand with their runs.
        if stem not in ("summary", "notes"):
            yield Section(stem, one.title, tables=[page_table(one)])


def _sorted_out(runs: Sequence[Run], things: Sequence[_Named]) -> list[list[_Named]]:
    """The things of each run, and last those of all of them: of several runs each has its own begin with its name."""
    out: list[list[_Named]] = [[] for _ in range(len(runs) + 1)]
    if len(runs) == 1:
        return [list(things), []]
    for thing in things:
        # "a-b-channels" is of the run "a-b", though "a" may be there as well.
        owners = [index for index, run in enumerate(runs) if thing.name.startswith(f"{file_stem(run.name)}-")]
        out[max(owners, key=lambda index: len(runs[index].name), default=-1)].append(thing)
    return out


def _by_stem(named: Sequence[Named], prefix: str = "") -> dict[str, Named]:
    return {one.name.removeprefix(prefix): one for one in named}


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs" if runs else "Published models"


def _lead(runs: Sequence[Run]) -> str:
    return lead(runs[0]) if len(runs) == 1 else ""


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_text, keep_trailing_newline=True)
    return environment.from_string(_asset("page.html"))


def _text(value: Any) -> Any:
    return value if isinstance(value, Markup) else _NO_TEXT.sub("\ufffd", str(value))


@cache
def _asset(name: str) -> str:
    return files("prunekit.reporting.html").joinpath("assets", name).read_text("utf-8")
