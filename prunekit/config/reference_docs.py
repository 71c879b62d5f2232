"""Render a Markdown reference of every recipe key from the schema: ``python -m prunekit.config.reference_docs``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from prunekit.config import schema, yaml
from prunekit.config.yaml import format_path
from prunekit.utils.text import one_line

BASE = "Recipe that this file extends: a file relative to this one, or the name of a shipped recipe. Not an override."
_TYPES = {"integer": "integer", "number": "number", "boolean": "boolean", "string": "string", "object": "mapping"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def render(level: int = 2) -> str:
    """Return one table per section, with type, allowed values, default and description of each key.

    Args:
        level: heading level of the sections.
    """
    return "\n".join(_section((), level))


def _section(path: yaml.Path, level: int) -> Iterator[str]:
    model = schema.get_section(path)
    properties = model.model_json_schema(by_alias=True)
    title = f"`{format_path(path)}`" if path else "Top level"
    summary = one_line(model.__doc__ or "") if path else "Keys outside of any section."
    yield f"{'#' * level} {title}\n\n{summary}\n"
    yield "| Key | Type and allowed values | Default | Description |\n|---|---|---|---|"
    if not path:
        yield f"| `base` | string | none | {BASE} |"
    subsections = []
    for key, field in model.model_fields.items():
        subsection = schema.get_section((*path, key))
        if subsection and subsection is not schema.Component:
            subsections.append((*path, key))
            continue
        default = "required" if field.is_required() else f"`{_default(field.get_default())}`"
        kind = _type(properties["properties"][key], properties.get("$defs", {}))
        yield f"| `{format_path((*path, key))}` | {kind} | {default} | {one_line(field.description or '')} |"
    yield ""
    for subsection in subsections:
        yield from _section(subsection, level)


def _type(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type and the allowed values of a JSON schema node."""
    if "anyOf" in node:
        return " or ".join(_type(member, definitions) for member in node["anyOf"])
    if "$ref" in node:
        return "name, or mapping with `name` and `options`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if node.get("type") == "array":
        kind, _, values = _type(node["items"], definitions).partition(" ")
        return f"list of {kind}s {values}".strip()
    bounds = [
        f"{sign} {int(node[key]) if node[key] == int(node[key]) else node[key]}"
        for key, sign in _BOUNDS.items()
        if key in node
    ]
    return " ".join([_TYPES.get(node.get("type"), "null"), ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    return value.name if isinstance(value, schema.Component) else json.dumps(value).strip('"')


if __name__ == "__main__":
    print(render())
