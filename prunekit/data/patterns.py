"""Textures and outlines of the generated images.

A *field* is float [S, S] in [0, 1], the weight of the second of two colors. An *outline* is float [S, S], the signed
distance to the edge of a shape in pixels, negative inside.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image


@cache
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column of each pixel center as a share of the side: two float arrays [S, S]."""
    steps = (np.arange(size) + 0.5) / size
    return np.repeat(steps[:, None], size, 1), np.repeat(steps[None], size, 0)


def _enlarge(cells: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(cells.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))


def _stretch(field: np.ndarray) -> np.ndarray:
    low, high = field.min(), field.max()
    return (field - low) / max(high - low, 1e-6)


def noise(rng: np.random.Generator, size: int, cells: int = 3, octaves: int = 4, roughness: float = 0.6) -> np.ndarray:
    """Value noise: upsampled random cells; each octave is twice as fine and ``roughness`` times as strong."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        side = min(cells * 2**octave, size)
        total += roughness**octave * _enlarge(rng.standard_normal((side, side)), size)
    return _stretch(total)


def gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth gradient between random levels at the corners."""
    return _stretch(_enlarge(rng.uniform(size=(2, 2)), size))


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Parallel, slightly bent stripes with soft or hard edges."""
    bend = noise(rng, size, 2, 1) * rng.uniform(0, 2)
    rows, columns = grid(size)
    angle = rng.uniform(0, np.pi)
    phase = (rows * np.sin(angle) + columns * np.cos(angle)) / rng.uniform(0.08, 0.3)
    return _clip(np.sin(2 * np.pi * (phase + rng.uniform()) + bend) * rng.uniform(0.5, 3) + 0.5)


def checks(rng: np.random.Generator, size: int) -> np.ndarray:
    """A checkerboard at any angle."""
    rows, columns = grid(size)
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.12, 0.4)
    across = (rows * np.sin(angle) + columns * np.cos(angle)) / period + rng.uniform()
    along = (rows * np.cos(angle) - columns * np.sin(angle)) / period + rng.uniform()
    return _clip(np.sin(2 * np.pi * across) * np.sin(2 * np.pi * along) * rng.uniform(1, 4) + 0.5)


def patches(rng: np.random.Generator, size: int) -> np.ndarray:
    """Large smooth patches with soft or hard edges."""
    field = noise(rng, size, 2, 3, 0.35) - rng.uniform(0.35, 0.65)
    return _clip(field * rng.uniform(4, 20) + 0.5)


def grain(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fine noise of one scale, like sand."""
    side = max(4, int(size * rng.uniform(0.25, 0.8)))
    return _stretch(_enlarge(rng.standard_normal((side, side)), size))


def dots(rng: np.random.Generator, size: int) -> np.ndarray:
    """A lattice of small dots."""
    rows, columns = grid(size)
    angle, period, spread = rng.uniform(0, np.pi), rng.uniform(0.1, 0.2), rng.uniform(0.2, 0.35)
    across = ((rows * np.sin(angle) + columns * np.cos(angle)) / period + rng.uniform()) % 1 - 0.5
    along = ((rows * np.cos(angle) - columns * np.sin(angle)) / period + rng.uniform()) % 1 - 0.5
    return _clip((spread - np.hypot(across, along)) * period * size + 0.5)


FIELDS = (noise, gradient, stripes, checks, patches, grain, dots)


def _clip(field: np.ndarray) -> np.ndarray:
    return np.clip(field, 0.0, 1.0)


def outline(rng: np.random.Generator, size: int, center: tuple[float, float], area: float) -> np.ndarray:
    """Return the outline of a random shape: ellipse, polygon, star, blob or ring.

    Args:
        rng: random generator.
        size: side of the image in pixels.
        center: row and column of the center, as shares of the side.
        area: approximate share of the image that the shape covers.
    """
    rows, columns = grid(size)
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1.0)
    y, x = rows - center[0], columns - center[1]
    u = (x * np.cos(turn) + y * np.sin(turn)) * np.sqrt(stretch)
    v = (y * np.cos(turn) - x * np.sin(turn)) / np.sqrt(stretch)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    unit = np.sqrt(area / np.pi)
    kind = rng.choice(5, p=(0.25, 0.25, 0.15, 0.25, 0.1))
    if kind == 0:
        level = radius / unit - 1
    elif kind == 1:
        corners = int(rng.integers(3, 7))
        level = radius / unit * np.cos(angle % (2 * np.pi / corners) - np.pi / corners) / np.cos(np.pi / corners)
        level = level * np.sqrt(np.sin(2 * np.pi / corners) * corners / (2 * np.pi)) - 1
    elif kind == 2:
        points, depth = int(rng.integers(4, 8)), rng.uniform(0.3, 0.5)
        tooth = np.abs(angle * points / np.pi % 2 - 1)
        level = radius / unit - (1 + depth * 0.5 - depth * (1 - tooth))
    elif kind == 3:
        edge = np.ones_like(angle)
        for wave in range(2, 6):
            edge += rng.normal(0, 0.28 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
        level = radius / unit - np.maximum(edge, 0.35)
    else:
        hole = rng.uniform(0.35, 0.55)
        outer = 1 / np.sqrt(1 - hole**2)
        level = np.abs(radius / unit - outer * (1 + hole) / 2) - outer * (1 - hole) / 2
    slope_y, slope_x = np.gradient(level)
    return level / np.maximum(np.hypot(slope_y, slope_x), 1e-3)


def coverage(distance: np.ndarray) -> np.ndarray:
    """Return the share of each pixel inside an outline: float [S, S]; 0.5 on the edge."""
    return _clip(0.5 - distance)


def segment(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the outline of a thin curve across the image."""
    rows, columns = grid(size)
    angle, width = rng.uniform(0, np.pi), rng.uniform(0.006, 0.014) * size
    offset = rng.uniform(-0.4, 0.4)
    bow = rng.uniform(-0.5, 0.5)
    along = (columns - 0.5) * np.cos(angle) + (rows - 0.5) * np.sin(angle)
    across = (rows - 0.5) * np.cos(angle) - (columns - 0.5) * np.sin(angle)
    return np.abs(across - offset - bow * along**2) * size - width
