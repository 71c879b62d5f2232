"""Declarative schemas for data from run folders: what does not match is removed and described, the rest is kept.

A schema is a dict (key → schema), a list with one item (the schema of every item) or a :class:`ValueType`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from prunekit.utils.io import format_problem, is_newer

FORMAT = 1  # of the files other than the summary
MAX_PROBLEMS = 3  # described per file
INVALID = object()
ANY_KEY = "*"  # the schema of the keys that a dict schema does not name


class ValueType(NamedTuple):
    """A type of leaf values: its name in messages, and the predicate that accepts a value."""

    name: str
    accepts: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that fits 64 bits, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)


def is_count(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1 << 63 and int(value) == value


def optional(kind: ValueType) -> ValueType:
    return ValueType(f"{kind.name} or null", lambda value: value is None or kind.accepts(value))


NUMBER = ValueType("a number", is_number)
COUNT = ValueType("a whole number", is_count)
FRACTION = ValueType("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1 + 1e-9)
DURATION = ValueType("a number of at least 0", lambda value: is_number(value) and value >= 0)
STRING = ValueType("a string", lambda value: isinstance(value, str))
BOOL = ValueType("true or false", lambda value: isinstance(value, bool))
PIXELS = ValueType("a number of pixels", lambda value: is_count(value) and value > 0)
OPTIONAL_COUNT, OPTIONAL_NUMBER, OPTIONAL_STRING = optional(COUNT), optional(NUMBER), optional(STRING)


def drop_invalid(value: Any, schema: Any, path: str, problems: list[str]) -> Any:
    """Return the value without the parts that do not match, or ``INVALID``; keys not in the schema are kept."""
    if isinstance(schema, ValueType):
        if schema.accepts(value):
            return value
        text = json.dumps(value, default=str)
        problems.append(f"{path} is {text[:40]}{'…' * (len(text) > 40)}, expected {schema.name}")
        return INVALID
    if not isinstance(value, type(schema)):
        problems.append(f"{path or 'it'} is {type_name(value)}, expected {type_name(schema)}")
        return INVALID
    if isinstance(schema, list):
        items = [drop_invalid(item, schema[0], f"{path}[{index}]", problems) for index, item in enumerate(value)]
        return [item for item in items if item is not INVALID]
    valid = {}
    for key, item in value.items():
        item_schema = schema.get(key, schema.get(ANY_KEY))
        if item_schema is not None:
            item = drop_invalid(item, item_schema, f"{path}.{key}" if path else str(key), problems)
        if item is not INVALID:
            valid[key] = item
    return valid


def type_name(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", bool: "a bool", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def validate_mapping(
    value: Any, schema: dict[str, Any], problems: list[str], newest_format: int = FORMAT
) -> dict[str, Any]:
    """As :func:`drop_invalid`; raise ValueError for anything but a mapping of a supported format."""
    check_format(value, newest_format)
    return drop_invalid(value, schema, "", problems)


def require_valid(value: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping that matches completely; raise ValueError otherwise.

    For tables, of which a part would be taken for the whole.
    """
    problems: list[str] = []
    valid = validate_mapping(value, schema, problems)
    if problems:
        raise ValueError(describe_problems(problems))
    return valid


def check_format(value: Any, newest: int = FORMAT) -> None:
    """Raise ValueError for anything but a mapping whose format this version reads."""
    if not isinstance(value, dict):
        raise ValueError(f"it is {type_name(value)}, expected a mapping")
    version = value.get("format", newest)
    if problem := format_problem(version, newest):
        raise ValueError(f"it {problem}{': pip install --upgrade prunekit' if is_newer(version, newest) else ''}")


def describe_problems(problems: list[str]) -> str:
    """Return the first few problems in one line."""
    omitted = len(problems) - MAX_PROBLEMS
    return "; ".join(problems[:MAX_PROBLEMS]) + (f"; and {omitted} more" if omitted > 0 else "")
