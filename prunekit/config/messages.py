"""Error messages for values that do not fit a pydantic model: what is wrong and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pydantic

from prunekit.config import registry, schema, yaml
from prunekit.config.yaml import format_path, quote


def group_by_path(error: pydantic.ValidationError, value: Any) -> dict[yaml.Path, list[Any]]:
    """Group errors by their path in ``value``; pydantic reports each member of a union separately."""
    groups: dict[yaml.Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        path: yaml.Path = ()
        inner = value
        for part in item["loc"]:
            if yaml.contains(inner, part):
                inner = inner[part]
            elif item["type"] != "missing" or part != item["loc"][-1]:
                break
            path = (*path, part)
        groups.setdefault(path, []).append(item)
    return groups


def describe_value(errors: Sequence[Any]) -> str:
    """Return what is wrong with one value; ``errors`` has one item per member of a union."""
    value = errors[0]["input"]
    if any(item["type"] in ("int_type", "int_from_float", "float_type") for item in errors):
        if isinstance(value, str) and type(yaml.parse(value).value) in (int, float):
            return f"{quote(value)} is a string; remove the quotes"
        if isinstance(value, float) and value.is_integer():
            return f"{quote(value)} is not an integer; write {int(value)}"
    return f"{quote(value)} {' or '.join(dict.fromkeys(map(_requirement, errors)))}"


def _requirement(error: dict[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "string_type":
        return "must be a string; put it in quotes"
    message = re.sub(r"^\w+ should ", "must ", error["msg"])
    return message.replace("an object", "a mapping of 'key: value' lines").replace(
        "valid array", "list, such as [1, 2]"
    )


def describe_missing_key(path: yaml.Path) -> str:
    if section := schema.get_section(path):
        required = [key for key, field in section.model_fields.items() if field.is_required()]
        return f"is missing; add the section with {' and '.join(required)}"
    return f"is missing; add '{path[-1]}: …'"


def describe_unknown_key(path: yaml.Path) -> str:
    known = list((schema.get_section(path[:-1]) or schema.Recipe).model_fields)
    # The same key in another section is a better hint than a similar key in this one.
    elsewhere = [format_path(other) for other in schema.all_keys() if other[-1] == path[-1]]
    if elsewhere:
        return f"unknown key here; use {' or '.join(elsewhere[:3])}"
    match = registry.closest_match(path[-1][:100], known)
    hint = f", did you mean {format_path((*path[:-1], match))!r}?" if match else "; remove it,"
    return f"unknown key{hint} known keys: {', '.join(known)}"


def describe_unknown_option(path: yaml.Path, owner: str, known: Sequence[str]) -> str:
    section_key = (*path[:-2], path[-1])
    if section_key in schema.all_keys():
        return f"{owner} has no such option; write it as {format_path(section_key)}"
    match = registry.closest_match(path[-1][:100], list(known))
    hint = f", did you mean {match!r}?" if match else ";"
    return f"{owner} has no such option{hint} known options: {', '.join(known) or 'none'}"
