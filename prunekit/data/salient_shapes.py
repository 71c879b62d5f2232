"""A generated set for salient object detection: textured pictures with one to three objects that stand out.

Nothing is downloaded and nothing is stored: picture ``index`` of a split is drawn from a generator seeded with (seed,
split, index), so it does not depend on what was drawn before, and no validation picture shares its seed with a training
picture. (At another size it is another picture.)
What makes an object stand out is local (its own texture, a lit body, a rim, contrast with what surrounds it), not its
colour: its colours come from the same palette as the background's, so a threshold on colour does not find it.
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
    """The generated pictures of one split; see :func:`salient_shapes`."""

    def __init__(self, split: str, count: int, size: int, seed: int):
        super().__init__([f"{split}-{index:05d}" for index in range(count)])
        # NumPy takes no negative seeds.
        self._key, self._size = (seed % 2**64, _SPLITS[split]), size
        self._last: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # Seeded by the name, not by the place: a set that has lost a pair still draws the others as before.
        number = int(self.names[index].rpartition("-")[2])
        held = self._last
        if held is None or held[0] != number:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*self._key, number])))
            self._last = held = (number, draw(rng, self._size))
        return held[1]

    def image(self, index: int) -> np.ndarray:
        return self.pair(index)[0]

    def mask(self, index: int) -> np.ndarray:
        return self.pair(index)[1]


@register_dataset("salient_shapes")
def salient_shapes(
    split: Literal["train", "val"], *, size: int, seed: int = 0, train: int = 1024, val: int = 200
) -> MaskDataset:
    """Generated pictures with one to three salient objects; needs no download.

    Args:
        split: which pictures; the two splits share no seed.
        size: side of the pictures in pixels.
        seed: the set; the same seed gives the same pictures.
        train: number of training pictures.
        val: number of validation pictures.

    Raises:
        DataError: a count below 1, a size below 16 or an unknown split.
    """
    counts = {"train": train, "val": val}
    if split not in counts:
        raise DataError(f"salient_shapes has no split {split!r}; it has train and val")
    if counts[split] < 1:
        raise DataError(f"salient_shapes with {split}={counts[split]} has no pictures; set it to 1 or more")
    if size < 16:
        raise DataError(f"salient_shapes cannot draw at size {size}; take 16 or more")
    return SalientShapes(split, counts[split], size, seed)


@dataclass(frozen=True)
class _Scene:
    """What the parts of one picture share.

    Attributes:
        palette: the colours of background and objects, float [3] each.
        field: which of FIELDS textures the first ground; no object has it.
        light: direction that the light comes from, in radians from the columns' axis towards the rows'.
    """

    palette: list[np.ndarray]
    field: int
    light: float


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture and its mask: uint8 [S, S, 3], and uint8 [S, S] of 0 and 255."""
    scene = _Scene(_palette(rng), int(rng.integers(len(FIELDS))), rng.uniform(0, 2 * np.pi))
    picture = _background(rng, size, scene)
    inside = np.zeros((size, size))
    for area in _areas(rng):
        centre = tuple(rng.uniform(0.15, 0.85, 2))
        distance = outline(rng, size, centre, area)
        cover = coverage(distance)
        _shadow(rng, picture, distance, scene.light)
        body = _body(rng, picture, distance, scene, centre, area)
        picture += cover[..., None] * (body - picture)
        inside = np.maximum(inside, cover)
    picture += rng.normal(0, rng.uniform(0.0, 0.03), picture.shape)
    return _levels(picture), np.where(inside >= 0.5, np.uint8(255), np.uint8(0))


def _levels(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Any hue, from grey to vivid, from dark to bright: float [3]."""
    hue, vivid, value = rng.uniform(), rng.uniform(0, 0.9), rng.uniform(0.15, 0.95)
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return value * (1 - vivid + vivid * wheel)


def _mix(first: np.ndarray, second: np.ndarray, field: np.ndarray) -> np.ndarray:
    return first + (second - first) * field[..., None]


def _palette(rng: np.random.Generator) -> list[np.ndarray]:
    """Four colours, each well away from those before it: what background and objects share."""
    chosen = [_colour(rng)]
    while len(chosen) < 4:
        candidates = [_colour(rng) for _ in range(4)]
        chosen.append(max(candidates, key=lambda c: min(np.linalg.norm(c - other) for other in chosen)))
    return chosen


def _background(rng: np.random.Generator, size: int, scene: _Scene) -> np.ndarray:
    """Two grounds of different colours and textures, one passing into the other, with clutter, under uneven light."""
    grounds = []
    for pair, texture in ((scene.palette[:2], scene.field), (scene.palette[2:], int(rng.integers(len(FIELDS))))):
        depth = rng.uniform(0.5, 1)
        grounds.append(_mix(pair[0], pair[0] + depth * (pair[1] - pair[0]), FIELDS[texture](rng, size)))
    where = patches(rng, size) if rng.uniform() < 0.5 else gradient(rng, size)
    picture = grounds[0] + where[..., None] * (grounds[1] - grounds[0])
    picture = _clutter(rng, size, picture, scene.palette)
    light = 1 + rng.uniform(0.1, 0.6) * (noise(rng, size, 2, 2) - 0.5)
    if rng.uniform() < 0.4:
        rows, columns = grid(size)
        light = light * (1 - rng.uniform(0.3, 1.2) * ((rows - 0.5) ** 2 + (columns - 0.5) ** 2))
    return picture * light[..., None] + rng.uniform(0.02, 0.12) * (noise(rng, size, 8, 3, 0.8) - 0.5)[..., None]


def _clutter(rng: np.random.Generator, size: int, picture: np.ndarray, palette: list[np.ndarray]) -> np.ndarray:
    """What a person passes over: faint flat shapes, spots out of focus, thin lines, specks."""
    for _ in range(rng.integers(0, 3)):
        distance = outline(rng, size, tuple(rng.uniform(0, 1, 2)), rng.uniform(0.03, 0.25))
        faint = coverage(distance)[..., None] * rng.uniform(0.15, 0.35)
        picture = picture + faint * (palette[int(rng.integers(4))] - picture)
    for _ in range(rng.integers(2, 5)):
        picture = picture + _blur(rng, size)[..., None] * (_colour(rng) - picture)
    for _ in range(rng.integers(0, 3)):
        picture = picture + coverage(segment(rng, size))[..., None] * (_colour(rng) - picture)
    if rng.uniform() < 0.5:
        rows, columns = grid(size)
        colour, radius = _colour(rng), rng.uniform(0.008, 0.02)
        specks = rng.uniform(0, 1, (int(rng.integers(4, 16)), 2))
        nearest = np.hypot(rows[..., None] - specks[:, 0], columns[..., None] - specks[:, 1]).min(-1)
        picture = picture + coverage((nearest - radius) * size)[..., None] * (colour - picture)
    return picture


def _blur(rng: np.random.Generator, size: int) -> np.ndarray:
    """How much of each pixel a spot out of focus takes: float [S, S]."""
    rows, columns = grid(size)
    middle, turn = rng.uniform(0, 1, 2), rng.uniform(0, np.pi)
    long, short = rng.uniform(0.12, 0.3), rng.uniform(0.08, 0.2)
    along = (columns - middle[1]) * np.cos(turn) + (rows - middle[0]) * np.sin(turn)
    across = (rows - middle[0]) * np.cos(turn) - (columns - middle[1]) * np.sin(turn)
    return rng.uniform(0.7, 1) * np.exp(-((along / long) ** 2 + (across / short) ** 2))


def _areas(rng: np.random.Generator) -> list[float]:
    """One to three shares of the picture, 5% to 36% together, and none below 2.5%."""
    count = int(rng.choice(3, p=(0.6, 0.25, 0.15))) + 1
    total = rng.uniform(0.05, 0.36)
    shares = rng.uniform(0.4, 1, count)
    return sorted(np.maximum(total * shares / shares.sum(), 0.025), reverse=True)


def _shadow(rng: np.random.Generator, picture: np.ndarray, distance: np.ndarray, light: float) -> None:
    """Darken, half of the time, what lies behind the object as seen from the light."""
    if rng.uniform() < 0.5:
        return
    size = len(distance)
    reach = rng.uniform(0.03, 0.08) * size
    rows, columns = (np.clip(np.arange(size) + round(reach * f(light)), 0, size - 1) for f in (np.sin, np.cos))
    moved = distance[rows[:, None], columns]
    picture *= 1 - rng.uniform(0.25, 0.5) * np.clip(0.5 - moved / 3, 0, 1)[..., None]


def _body(
    rng: np.random.Generator,
    picture: np.ndarray,
    distance: np.ndarray,
    scene: _Scene,
    centre: tuple[float, float],
    area: float,
) -> np.ndarray:
    """The colours of an object: float [S, S, 3]; of the background's palette, against its surroundings, lit, rimmed."""
    size, palette, light = len(picture), scene.palette, scene.light
    around = picture[(distance > 0) & (distance < 0.1 * size)].mean(0)
    # Of the palette or between two of it, and sooner near the picture's mean than far from it: an object contrasts with
    # what lies around it, but is no more unusual in colour than the background elsewhere.
    candidates = [*palette, *((palette[i] + palette[i - 1]) / 2 for i in range(len(palette)))]
    gaps = np.array([np.linalg.norm(colour - around) for colour in candidates])
    whole = picture.mean((0, 1))
    unusual = np.array([np.linalg.norm(colour - whole) for colour in candidates])
    weights = np.where(gaps > 0.2, 1.0, 1e-3) * np.exp(-((unusual / 0.3) ** 2)) + 1e-9
    first = candidates[int(rng.choice(len(candidates), p=weights / weights.sum()))]
    second = first + rng.normal(0, 0.15, 3)
    field = int(rng.integers(len(FIELDS) - 1))
    body = _mix(first, second, FIELDS[field + (field >= scene.field)](rng, size))
    rows, columns = grid(size)
    radius = np.sqrt(area / np.pi)
    facing = ((rows - centre[0]) * np.sin(light) + (columns - centre[1]) * np.cos(light)) / radius
    body = body * (1 + rng.uniform(0.15, 0.4) * facing)[..., None]
    # A rim: darker or lighter than the body, most of the time.
    if rng.uniform() < 0.95:
        width = rng.uniform(0.015, 0.03) * size
        tone = 0.1 if around.mean() > 0.45 else 0.95
        body = body + (rng.uniform(0.6, 0.95) * coverage(-distance - width)[..., None]) * (tone - body)
    return body
