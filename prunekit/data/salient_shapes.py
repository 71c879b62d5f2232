"""A generated data set for salient object detection: textured images with one to three salient objects.

Image ``index`` of a split is drawn from a generator seeded with (seed, split, index), so that images are independent
and the splits are disjoint. Objects are salient by local cues (texture, shading, rim, contrast with their
surroundings), not by color: their colors come from the palette of the background, so that a color threshold does not
find them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from prunekit.config.registry import register_dataset
from prunekit.data.datasets import MaskDataset
from prunekit.data.patterns import FIELDS, coverage, gradient, grid, noise, outline, patches, segment
from prunekit.errors import DataError

_SPLITS = {"train": 0, "val": 1}


class SalientShapes(MaskDataset):
    """The generated images of one split; see :func:`salient_shapes`."""

    def __init__(self, split: str, count: int, size: int, seed: int):
        super().__init__([f"{split}-{index:05d}" for index in range(count)])
        # NumPy does not accept negative seeds.
        self._key, self._size = (seed % 2**64, _SPLITS[split]), size
        self._last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # Seeded by name, since images may have been dropped.
        number = int(self.names[index].rpartition("-")[2])
        last = self._last
        if last is None or last[0] != number:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*self._key, number])))
            self._last = last = (number, draw(rng, self._size))
        return last[1]

    def image(self, index: int) -> np.ndarray:
        return self.pair(index)[0]

    def mask(self, index: int) -> np.ndarray:
        return self.pair(index)[1]


@register_dataset("salient_shapes")
def salient_shapes(
    split: Literal["train", "val"], *, size: int, seed: int = 0, train: int = 1024, val: int = 200
) -> MaskDataset:
    """Generated images with one to three salient objects; needs no download.

    Args:
        split: ``train`` or ``val``.
        size: height and width of the images in pixels.
        seed: the same seed gives the same images.
        train: number of training images.
        val: number of validation images.

    Raises:
        DataError: a count below 1, a size below 16, or an unknown split.
    """
    counts = {"train": train, "val": val}
    if split not in counts:
        raise DataError(f"salient_shapes has no split {split!r}; use train or val")
    if counts[split] < 1:
        raise DataError(f"salient_shapes: {split}={counts[split]}: must be at least 1")
    if size < 16:
        raise DataError(f"salient_shapes: size={size}: must be at least 16")
    return SalientShapes(split, counts[split], size, seed)


@dataclass(frozen=True)
class _Scene:
    """What the parts of one image share."""

    palette: list[np.ndarray]  # the colors of background and objects, float [3] each
    field: int  # index into FIELDS of the texture of the first ground; no object uses it
    light: float  # its direction in radians, from the column axis towards the row axis


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, uint8 [S, S, 3], and its mask, uint8 [S, S] of 0 and 255."""
    scene = _Scene(_palette(rng), int(rng.integers(len(FIELDS))), rng.uniform(0, 2 * np.pi))
    image = _background(rng, size, scene)
    inside = np.zeros((size, size))
    for area in _areas(rng):
        center = tuple(rng.uniform(0.15, 0.85, 2))
        distance = outline(rng, size, center, area)
        cover = coverage(distance)
        _shadow(rng, image, distance, scene.light)
        body = _body(rng, image, distance, scene, center, area)
        image += cover[..., None] * (body - image)
        inside = np.maximum(inside, cover)
    image += rng.normal(0, rng.uniform(0.0, 0.03), image.shape)
    return _levels(image), np.where(inside >= 0.5, np.uint8(255), np.uint8(0))


def _levels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _color(rng: np.random.Generator) -> np.ndarray:
    """Return a random color, float [3]."""
    hue, vivid, value = rng.uniform(), rng.uniform(0, 0.9), rng.uniform(0.15, 0.95)
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return value * (1 - vivid + vivid * wheel)


def _mix(first: np.ndarray, second: np.ndarray, field: np.ndarray) -> np.ndarray:
    return first + (second - first) * field[..., None]


def _palette(rng: np.random.Generator) -> list[np.ndarray]:
    """Return four well-separated colors."""
    chosen = [_color(rng)]
    while len(chosen) < 4:
        candidates = [_color(rng) for _ in range(4)]
        chosen.append(max(candidates, key=lambda c: min(np.linalg.norm(c - other) for other in chosen)))
    return chosen


def _background(rng: np.random.Generator, size: int, scene: _Scene) -> np.ndarray:
    """Return two grounds of different colors and textures, blended, with clutter and uneven lighting."""
    grounds = []
    for pair, texture in ((scene.palette[:2], scene.field), (scene.palette[2:], int(rng.integers(len(FIELDS))))):
        depth = rng.uniform(0.5, 1)
        grounds.append(_mix(pair[0], pair[0] + depth * (pair[1] - pair[0]), FIELDS[texture](rng, size)))
    where = patches(rng, size) if rng.uniform() < 0.5 else gradient(rng, size)
    image = grounds[0] + where[..., None] * (grounds[1] - grounds[0])
    image = _clutter(rng, size, image, scene.palette)
    light = 1 + rng.uniform(0.1, 0.6) * (noise(rng, size, 2, 2) - 0.5)
    if rng.uniform() < 0.4:
        rows, columns = grid(size)
        light = light * (1 - rng.uniform(0.3, 1.2) * ((rows - 0.5) ** 2 + (columns - 0.5) ** 2))
    return image * light[..., None] + rng.uniform(0.02, 0.12) * (noise(rng, size, 8, 3, 0.8) - 0.5)[..., None]


def _clutter(rng: np.random.Generator, size: int, image: np.ndarray, palette: list[np.ndarray]) -> np.ndarray:
    """Add distractors: faint flat shapes, blurred spots, thin lines, specks."""
    for _ in range(rng.integers(0, 3)):
        distance = outline(rng, size, tuple(rng.uniform(0, 1, 2)), rng.uniform(0.03, 0.25))
        faint = coverage(distance)[..., None] * rng.uniform(0.15, 0.35)
        image = image + faint * (palette[int(rng.integers(4))] - image)
    for _ in range(rng.integers(2, 5)):
        image = image + _blur(rng, size)[..., None] * (_color(rng) - image)
    for _ in range(rng.integers(0, 3)):
        image = image + coverage(segment(rng, size))[..., None] * (_color(rng) - image)
    if rng.uniform() < 0.5:
        rows, columns = grid(size)
        color, radius = _color(rng), rng.uniform(0.008, 0.02)
        specks = rng.uniform(0, 1, (int(rng.integers(4, 16)), 2))
        nearest = np.hypot(rows[..., None] - specks[:, 0], columns[..., None] - specks[:, 1]).min(-1)
        image = image + coverage((nearest - radius) * size)[..., None] * (color - image)
    return image


def _blur(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the weight of a blurred spot at each pixel: float [S, S]."""
    rows, columns = grid(size)
    middle, turn = rng.uniform(0, 1, 2), rng.uniform(0, np.pi)
    long, short = rng.uniform(0.12, 0.3), rng.uniform(0.08, 0.2)
    along = (columns - middle[1]) * np.cos(turn) + (rows - middle[0]) * np.sin(turn)
    across = (rows - middle[0]) * np.cos(turn) - (columns - middle[1]) * np.sin(turn)
    return rng.uniform(0.7, 1) * np.exp(-((along / long) ** 2 + (across / short) ** 2))


def _areas(rng: np.random.Generator) -> list[float]:
    """Return one to three shares of the image area, 5% to 36% in total and at least 2.5% each."""
    count = int(rng.choice(3, p=(0.6, 0.25, 0.15))) + 1
    total = rng.uniform(0.05, 0.36)
    shares = rng.uniform(0.4, 1, count)
    return sorted(np.maximum(total * shares / shares.sum(), 0.025), reverse=True)


def _shadow(rng: np.random.Generator, image: np.ndarray, distance: np.ndarray, light: float) -> None:
    """Darken the side of the object away from the light, with probability 0.5."""
    if rng.uniform() < 0.5:
        return
    size = len(distance)
    reach = rng.uniform(0.03, 0.08) * size
    rows, columns = (np.clip(np.arange(size) + round(reach * f(light)), 0, size - 1) for f in (np.sin, np.cos))
    moved = distance[rows[:, None], columns]
    image *= 1 - rng.uniform(0.25, 0.5) * np.clip(0.5 - moved / 3, 0, 1)[..., None]


def _body(
    rng: np.random.Generator,
    image: np.ndarray,
    distance: np.ndarray,
    scene: _Scene,
    center: tuple[float, float],
    area: float,
) -> np.ndarray:
    """Return the colors of an object: float [S, S, 3]."""
    size, palette, light = len(image), scene.palette, scene.light
    around = image[(distance > 0) & (distance < 0.1 * size)].mean(0)
    # Prefer colors near the mean of the image: the object contrasts with its surroundings, but its color is no more
    # unusual than the background elsewhere.
    candidates = [*palette, *((palette[i] + palette[i - 1]) / 2 for i in range(len(palette)))]
    gaps = np.array([np.linalg.norm(color - around) for color in candidates])
    whole = image.mean((0, 1))
    unusual = np.array([np.linalg.norm(color - whole) for color in candidates])
    weights = np.where(gaps > 0.2, 1.0, 1e-3) * np.exp(-((unusual / 0.3) ** 2)) + 1e-9
    first = candidates[int(rng.choice(len(candidates), p=weights / weights.sum()))]
    second = first + rng.normal(0, 0.15, 3)
    field = int(rng.integers(len(FIELDS) - 1))
    body = _mix(first, second, FIELDS[field + (field >= scene.field)](rng, size))
    rows, columns = grid(size)
    radius = np.sqrt(area / np.pi)
    facing = ((rows - center[0]) * np.sin(light) + (columns - center[1]) * np.cos(light)) / radius
    body = body * (1 + rng.uniform(0.15, 0.4) * facing)[..., None]
    # Usually a rim that is darker or lighter than the body.
    if rng.uniform() < 0.95:
        width = rng.uniform(0.015, 0.03) * size
        tone = 0.1 if around.mean() > 0.45 else 0.95
        body = body + (rng.uniform(0.6, 0.95) * coverage(-distance - width)[..., None]) * (tone - body)
    return body
