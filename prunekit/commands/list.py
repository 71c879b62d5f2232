"""The table of shipped recipes and models and of all names that recipes can use: the command ``list``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from prunekit.config import registry
from prunekit.config.overrides import shipped_recipes
from prunekit.weights import card_summary, shipped_models

REGISTRIES = (
    *("backbones", "datasets", "tasks", "losses", "decays", "importances"),
    *("optimizers", "schedules", "augmentations"),
)


def table() -> Table:
    """Return all names by kind: origin, description, and options with their defaults."""
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "from", "description and options"):
        out.add_column(title, overflow="fold")
    recipes = ((name, "prunekit", Text(recipe_summary(path))) for name, path in shipped_recipes().items())
    _add_section(out, "recipe", recipes)
    models = ((name, "prunekit", Text(card_summary(folder))) for name, folder in shipped_models().items())
    _add_section(out, "model", models)
    for name in REGISTRIES:
        builders: registry.Registry = getattr(registry, name)
        _add_section(out, builders.kind, _rows(builders))
    return out


def recipe_summary(path: Path) -> str:
    """Return the first line of a recipe, a comment that describes it."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def _add_section(out: Table, kind: str, rows: Iterable[tuple[str, str, Text]]) -> None:
    out.add_row(Text(kind, style="bold"))
    for name, origin, description in rows:
        # As Text, so that brackets in the names of a plugin are not markup.
        out.add_row(Text(f"  {name}"), Text(origin), description)


def _rows(builders: registry.Registry) -> Iterator[tuple[str, str, Text]]:
    from prunekit.utils.environment import package_version  # imports torch

    for entry in builders:
        lines = [Text(entry.summary)] if entry.summary else []
        if options := _options(builders, entry):
            lines.append(Text(options, style="dim"))
        yield entry.name, f"{entry.origin} {entry.version or ''}".strip(), Text("\n").join(lines)
    for family in builders.families():
        version = package_version(family.prefix)
        yield f"{family.prefix}/…", f"{family.prefix} {version}" if version else "not installed", Text(family.summary)


def _options(builders: registry.Registry, entry: registry.Entry) -> str:
    """Return ``width=20, split=[0.5, 0.5]``, with defaults as a recipe writes them."""
    try:
        parameters = builders.options_of(entry.build).values()
    except Exception as error:  # Evaluating a plugin's annotations may raise anything.
        return f"options cannot be read ({registry.describe_error(error)})"
    words = []
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            words.append("…")
        else:
            words.append(p.name if p.default is p.empty else f"{p.name}={_default(p.default)}")
    return ", ".join(words)


def _default(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_default, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
