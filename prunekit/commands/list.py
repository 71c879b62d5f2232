"""What recipes can name, as a table: what the command ``list`` shows."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from prunekit.config import registry
from prunekit.config.sources import shipped_recipes

TABLES = (
    *("backbones", "datasets", "tasks", "losses", "decays", "importances"),
    *("optimizers", "schedules", "augmentations"),
)


def table() -> Table:
    """All names, kind by kind: where each comes from, what it is, and its options with their defaults."""
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "from", "what it is, and its options"):
        out.add_column(title, overflow="fold")
    for kind in TABLES:
        names: registry.Registry = getattr(registry, kind)
        _section(out, names.kind, _rows(names))
    _section(out, "recipe", ((name, "prunekit", Text()) for name in shipped_recipes()))
    return out


def _section(out: Table, kind: str, rows: Iterator[tuple[str, str, Text]]) -> None:
    out.add_row(Text(kind, style="bold"))
    for name, origin, what in rows:
        # Names are anybody's: as Text, what stands in brackets is no markup.
        out.add_row(Text(f"  {name}"), Text(origin), what)


def _rows(names: registry.Registry) -> Iterator[tuple[str, str, Text]]:
    for entry in names:
        lines = [Text(entry.summary)] if entry.summary else []
        if options := _options(names, entry):
            lines.append(Text(options, style="dim"))
        yield entry.name, f"{entry.origin} {entry.version or ''}".strip(), Text("\n").join(lines)
    for family in names.families():
        version = _version(family.prefix)
        origin = f"{family.prefix} {version}" if version else "not installed"
        yield f"{family.prefix}/…", origin, Text(family.summary)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _options(names: registry.Registry, entry: registry.Entry) -> str:
    """``width=20, split=[0.5, 0.5]``: defaults as a recipe would have them, those without one just named."""
    try:
        parameters = names.options_of(entry.build).values()
    except Exception as error:  # Whatever the annotations of a plugin raise when they are evaluated.
        return f"its options cannot be read ({registry.describe_error(error)})"
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
