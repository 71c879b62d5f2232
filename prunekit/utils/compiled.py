"""Models that ``torch.compile`` has wrapped."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def unwrap(model: T) -> T:
    """Return the module that ``torch.compile`` has wrapped, whose names have no prefix; any other model as it is."""
    return getattr(model, "_orig_mod", model)
