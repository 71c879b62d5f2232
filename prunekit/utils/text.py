"""Helpers for messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

_MAX_ENTRIES = 2000  # of a folder that are compared


def plural(count: int, noun: str) -> str:
    """Return "1 channel", "2 channels"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def si(number: float) -> str:
    """Return a number with three digits and an SI prefix: 11_689_512 → "11.7M"."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * limit:  # what rounds to 1000 gets the next prefix
            return f"{number / limit:.3g}{prefix}"
    return f"{number:.3g}"


def join_names(names: Sequence[str], most: int = 3) -> str:
    """Return "a", "a and b" or "a, b, c and 4 more"."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: object) -> str:
    """Return a text in one line; an error's message, or its type's name where it has none."""
    line = " ".join(str(text).split())
    return line or (type(text).__name__ if isinstance(text, BaseException) else "")


def closest_match(word: str, known: Sequence[str]) -> str | None:
    """Return the known word closest to a mistyped one, ignoring case, or None if none is close."""
    by_lower = {name.lower(): name for name in reversed(known)}
    return next((by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)), None)


def suggest(word: str, known: Sequence[str], otherwise: str = ";") -> str:
    """Return ``, did you mean 'NAME'?`` with the known word closest to a mistyped one, or ``otherwise``."""
    match = closest_match(word, known)
    return f", did you mean {match!r}?" if match else otherwise


def did_you_mean(path: Path) -> str:
    """Return ``; did you mean PATH?`` with the existing path closest to a mistyped one, or nothing if none is close."""
    parts = path.expanduser().parts
    found = Path(parts[0]) if path.expanduser().is_absolute() else Path()
    try:
        for part in parts[found.is_absolute() :]:
            if not (found / part).exists():
                part = closest_match(part, [entry.name for entry in islice(found.iterdir(), _MAX_ENTRIES)])
            if part is None:
                return ""
            found /= part
    except (OSError, ValueError):
        return ""
    return f"; did you mean {found}?" if parts else ""
