"""Trained models that come with prunekit: each is a small run folder with a model card, ``README.md``."""

from __future__ import annotations

from pathlib import Path

from prunekit.utils.text import closest_match

_FOLDER = Path(__file__).parent
CARD = "README.md"


def shipped_models() -> dict[str, Path]:
    """Return name → run folder of the models that come with prunekit, sorted by name."""
    return {card.parent.name: card.parent for card in sorted(_FOLDER.glob(f"*/{CARD}"))}


def locate(path: str | Path) -> Path:
    """Return the folder of a shipped model where ``path`` is its name alone and no path of that name exists."""
    path = Path(path)
    return path if path.exists() else shipped_models().get(str(path), path)


def similar_name(path: Path) -> str:
    """Return ``; did you mean NAME?`` with the shipped model closest to a mistyped name, or nothing."""
    match = closest_match(str(path), list(shipped_models()))
    return f"; did you mean {match}?" if match else ""


def is_shipped(path: Path) -> bool:
    """Return whether a path is the folder of a shipped model."""
    return path.parent == _FOLDER


def card_summary(folder: Path) -> str:
    """Return the first line of a model card after its title."""
    return next(line for line in (folder / CARD).read_text(encoding="utf-8").split("\n")[1:] if line)
