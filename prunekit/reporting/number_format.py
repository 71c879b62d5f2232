"""Format numbers and texts for readers, and names for file systems."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from prunekit.utils.io import sha256

NOT_AVAILABLE = "–"


def format_size(size: tuple[int, int] | None) -> str:
    """``(64×64)``, height before width, or ``(size unknown)``."""
    return f"({size[0]}×{size[1]})" if size else "(size unknown)"


def format_number(value: Any, digits: int | None = None) -> str:
    """Format a number in full: 210,985, or 0.8123 with ``digits`` decimals.

    A missing value is a dash, a text is unchanged. What would round to zero keeps two significant digits: 1.2e-06.
    """
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOT_AVAILABLE
    if digits is None:
        return f"{value:,}"
    return f"{value:.1e}" if 0 < abs(value) < 0.5 * 10**-digits else f"{value:,.{digits}f}"


def short_number(value: Any) -> str:
    """Format a number with few characters: 210,985, then 35.3 M and 6.11 G; a missing value is a dash."""
    if pd.isna(value):
        return NOT_AVAILABLE
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        # 999,950 would round to 1000.0 of the smaller unit.
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {unit}" if abs(value) < 999.5 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:,.0f}"


def compact_number(value: Any) -> str:
    """Format a number with three digits and without a space: 950, 9.50k, 73.3k, 2.00M; counts below 1,000 in full."""
    if pd.isna(value) or abs(value) < 999.5:
        return format_number(value, 0)
    unit, factor = next(
        (u, f) for u, f in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if abs(value) >= f * 0.9995
    )
    return f"{value / factor:#.3g}".rstrip(".") + unit


def format_seconds(seconds: float) -> str:
    """``41 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02} min"


def printable(text: str) -> str:
    """Replace control characters, which could change the state of a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def file_stem(name: str) -> str:
    """Return a run's name as the start of a file name; if a file system would refuse it, a part of it and a digest."""
    safe = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", name).encode(errors="replace")
    if safe == name.encode(errors="replace") and len(safe) <= 180:
        return name
    digest = sha256(name.encode(errors="surrogatepass"))[:8]
    return f"{safe[:160].decode(errors='ignore')}-{digest}"
