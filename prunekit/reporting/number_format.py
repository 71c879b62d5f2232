"""Numbers as people read them, and names as file systems take them."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from prunekit.utils.io import sha256

NOTHING = "–"


def size_text(size: tuple[int, int] | None) -> str:
    """``(64×64)``, height before width, or ``(size unknown)``."""
    return f"({size[0]}×{size[1]})" if size else "(size unknown)"


def written_out(value: Any, digits: int | None = None) -> str:
    """A number in full: 210,985, or with ``digits`` behind the point 0.8123; a dash where there is none; a text as it
    is. What would round to nothing keeps its two first digits: 1.2e-06."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOTHING
    if digits is None:
        return f"{value:,}"
    return f"{value:.1e}" if 0 < abs(value) < 0.5 * 10**-digits else f"{value:,.{digits}f}"


def short_number(value: Any) -> str:
    """A number in few characters: 210,985, then 35.3 M and 6.11 G; a dash where there is none."""
    if pd.isna(value):
        return NOTHING
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        # 999,950 would round to 1000.0 of the smaller unit.
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {unit}" if abs(value) < 999.5 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:,.0f}"


def seconds_text(seconds: float) -> str:
    """``41 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02} min"


def file_stem(name: str) -> str:
    """A run's name as the beginning of a file's: as it is, or, where a file system would refuse it, a part of it and a
    digest that keeps it distinct."""
    safe = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", name).encode(errors="replace")
    if safe == name.encode(errors="replace") and len(safe) <= 180:
        return name
    digest = sha256(name.encode(errors="surrogatepass"))[:8]
    return f"{safe[:160].decode(errors='ignore')}-{digest}"
