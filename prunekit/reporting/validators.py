"""Kinds of values, and taking out of what was read all that is of another kind than it should be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
ENOUGH = 3  # faults of one file that are told

GONE = object()
EACH = "*"


@dataclass(frozen=True)
class Kind:
    """A kind of value: the word for it, and whether a value is one."""

    word: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether this is a number that can be shown: finite, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether this is a whole number of at least 0 that fits 64 bits."""
    return is_number(value) and 0 <= value < 1 << 63 and int(value) == value


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.word} or null", lambda value: value is None or kind.fits(value))


NUMBER = Kind("a number", is_number)
COUNT = Kind("a whole number", is_count)
SHARE = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1 + 1e-9)
DURATION = Kind("a number of at least 0", lambda value: is_number(value) and value >= 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SIZE = Kind("a number of pixels", lambda value: is_count(value) and value > 0)
MAYBE_COUNT, MAYBE_NUMBER, MAYBE_TEXT = or_null(COUNT), or_null(NUMBER), or_null(TEXT)


def drop_invalid(value: Any, wanted: Any, where: str, faults: list[str]) -> Any:
    """The value without what does not fit, or ``GONE``; keys that nobody knows stay."""
    if isinstance(wanted, Kind):
        if wanted.fits(value):
            return value
        shown = json.dumps(value, default=str)
        faults.append(f"{where} is {shown[:40]}{'…' * (len(shown) > 40)}, where {wanted.word} is wanted")
        return GONE
    if not isinstance(value, type(wanted)):
        word = "a list" if isinstance(wanted, list) else "a mapping"
        faults.append(f"{where or 'it'} is {kind_of(value)}, where {word} is wanted")
        return GONE
    if isinstance(wanted, list):
        items = [drop_invalid(item, wanted[0], f"{where}[{index}]", faults) for index, item in enumerate(value)]
        return [item for item in items if item is not GONE]
    out = {}
    for key, item in value.items():
        below = wanted.get(key, wanted.get(EACH))
        sifted = item if below is None else drop_invalid(item, below, f"{where}.{key}" if where else str(key), faults)
        if sifted is not GONE:
            out[key] = sifted
    return out


def kind_of(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "nothing")


def mapping(value: Any, wanted: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it is {kind_of(value)}, where a mapping is wanted")
    known(value)
    return drop_invalid(value, wanted, "", faults)


def whole(value: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """As it is, where all of it fits: a part of a table would pass for the whole."""
    faults: list[str] = []
    sifted = mapping(value, wanted, faults)
    if faults:
        raise ValueError(describe_problem(faults))
    return sifted


def known(value: Mapping[str, Any]) -> None:
    """Raise ValueError for what a newer prunekit has written."""
    held = value.get("format", FORMAT)
    if not isinstance(held, int) or isinstance(held, bool) or held < 1:
        raise ValueError(f"its format is {json.dumps(held, default=str)[:40]}")
    if held > FORMAT:
        raise ValueError(f"it has format {held}, this prunekit reads up to {FORMAT}: pip install --upgrade prunekit")


def describe_problem(faults: list[str]) -> str:
    """The first few of these in one sentence."""
    rest = len(faults) - ENOUGH
    return "; ".join(faults[:ENOUGH]) + (f"; and {rest} more" if rest > 0 else "")
