"""Error messages for values that do not fit a pydantic model: what is wrong and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic

from prunekit.config import registry, schema, yaml
from prunekit.config.yaml import format_path, quote

# Type of a pydantic error → what is wrong, and the fix.
_TYPES = {
    "int_type": ("is not an integer", "use one, such as 10"),
    "int_from_float": ("is not an integer", "use one, such as 10"),
    "float_type": ("is not a number", "use one, such as 0.1"),
    "bool_type": ("is not a boolean", "use true or false"),
    "string_type": ("is not a string", "put it in quotes if it is meant as one"),
    "none_required": ("is not null", "use null"),
    **dict.fromkeys(("model_type", "dict_type"), ("is not a mapping", "write 'key: value' lines below it")),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), ("is not a list", "write it in brackets, such as [1, 2]")),
}
_BOUNDS = {
    "greater_than": ("is too low", "must be above", "gt"),
    "greater_than_equal": ("is too low", "must be at least", "ge"),
    "less_than": ("is too high", "must be below", "lt"),
    "less_than_equal": ("is too high", "must be at most", "le"),
}


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
    """Return what is wrong with one value and how to fix it."""
    phrases = [_phrase(item["type"], item["input"], item.get("ctx", {}), item["msg"]) for item in errors]
    problems = dict.fromkeys(problem for problem, _ in phrases)
    fixes = dict.fromkeys(fix for _, fix in phrases)
    return f"{quote(errors[0]['input'])} {' and '.join(problems)}; {' or '.join(fixes)}"


def _phrase(kind: str, value: Any, context: dict[str, Any], message: str) -> tuple[str, str]:
    if kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(yaml.parse(value).value):
        return "is a string", "remove the quotes"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return "is not an integer", f"write {int(value)}"
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _BOUNDS:
        problem, fix, key = _BOUNDS[kind]
        bound = context[key]
        return problem, f"{fix} {int(bound) if bound == int(bound) else bound}"
    if kind == "literal_error":
        return "is not allowed", f"use {context['expected']}"
    if kind == "value_error":
        problem, _, fix = str(context["error"]).partition("; ")
        return problem, fix or "use another value"
    return f"does not fit ({message[:1].lower()}{message[1:]})", "use another value"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    if match := registry.closest_match(path[-1][:100], known):
        return f"unknown key, did you mean {format_path((*path[:-1], match))!r}? known keys: {', '.join(known)}"
    return f"unknown key; remove it, known keys: {', '.join(known)}"


def describe_unknown_option(path: yaml.Path, owner: str, known: Sequence[str]) -> str:
    section_key = (*path[:-2], path[-1])
    if section_key in schema.all_keys():
        return f"{owner} has no such option; write it as {format_path(section_key)}"
    match = registry.closest_match(path[-1][:100], list(known))
    hint = f", did you mean {match!r}?" if match else ";"
    return f"{owner} has no such option{hint} known options: {', '.join(known) or 'none'}"
