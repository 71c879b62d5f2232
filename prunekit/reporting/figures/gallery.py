"""Pictures of the validation set, and what each model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from prunekit.reporting.figures.run_data import number
from prunekit.reporting.figures.style import LOOKS, Drawing, new_figure, plain, shorten, styled
from prunekit.reporting.loader import PARTS, Example, Run

SHOWN = 8  # of the images that every run shows
TILE, GAP, LINE = 84, 6, 14  # pixels
DPI = 120  # pictures make large files: at 150 a gallery of photographs would take half a megabyte
WRONG = "#B04A00"


def gallery_drawings(run: Run) -> Iterator[Drawing]:
    """The drawings of a run's gallery: images that are the same for every run on the data, and the extremes."""
    examples = [one for one in run.gallery if "image" in one.files]
    fixed = [one for one in examples if one.fixed]
    chosen = [fixed[i] for i in np.unique(np.linspace(0, len(fixed) - 1, min(SHOWN, len(fixed))).astype(int))]
    extremes = [one for kind in ("best", "worst") for one in examples if one.kind == kind]
    maps = any("truth" in one.files for one in examples)
    drawn = maps_figure if maps else classes_figure
    what = "The mean absolute error (MAE, 0 to 1) stands below each map." if maps else "Wrong classes are marked by ✗."
    if chosen:
        yield Drawing(
            "gallery",
            "Gallery",
            f"{len(chosen)} validation images, evenly from the set, the same for every run on it. {what}",
            drawn(run, chosen),
        )
    if extremes:
        measure = "MAE" if maps else "probability of the right class"
        yield Drawing(
            "gallery_extremes",
            "Best and worst cases",
            f"The validation images on which the last model does best and worst by {measure}. {what}",
            drawn(run, extremes, kinds=True),
        )


class _Sheet:
    """Tiles with words below them, on white, to be shown pixel by pixel.

    Args:
        rows, columns: how many cells.
        width: of a cell, pixels.
        lines: of words below each tile.
    """

    def __init__(self, rows: int, columns: int, width: int, lines: int):
        self.width, self.height = width, TILE + LINE * lines + GAP
        self.pixels = np.full((rows * self.height, columns * width, 3), 255, np.uint8)

    def put(self, row: int, column: int, tile: np.ndarray) -> None:
        """A tile, no larger than ``TILE``, in the middle of its place."""
        height, width = tile.shape[:2]
        top = row * self.height + (TILE - height) // 2
        left = column * self.width + (self.width - width) // 2
        self.pixels[top : top + height, left : left + width] = tile

    def below(self, row: int, column: int, line: int) -> tuple[float, float]:
        """Where the words stand: the middle of their upper edge."""
        return (column + 0.5) * self.width, row * self.height + TILE + line * LINE + 2

    def figure(self, title: str, above: int, left: int) -> tuple[Figure, Axes]:
        """A figure in which a pixel of the sheet is one of the PNG, with so many pixels above it and on its left."""
        height, width = self.pixels.shape[0] + above, self.pixels.shape[1] + left
        figure = new_figure(width / DPI, height / DPI, dpi=DPI)
        figure.set_layout_engine(None)
        axes = figure.add_axes((left / width, 0, 1 - left / width, 1 - above / height))
        sides = (0, self.pixels.shape[1], self.pixels.shape[0], 0)
        axes.imshow(self.pixels, interpolation="none", aspect="auto", extent=sides)
        axes.set_axis_off()
        name = plain(shorten(title, max(12, width // 13)))
        figure.text(0.5, 1 - 6 / height, name, ha="center", va="top", fontsize=10)
        return figure, axes


def maps_figure(run: Run, examples: Sequence[Example], kinds: bool = False) -> Figure:
    """A row for each image: the image, the truth, and the map of each model with its error; with ``kinds`` also whether
    it is of the best or the worst."""
    columns = ["image", "truth", *(part for part in PARTS if any(part in one.files for one in examples))]
    with styled():
        sheet = _Sheet(len(examples), len(columns), TILE + GAP, 1)
        words: list[tuple[int, int, str]] = []
        for row, one in enumerate(examples):
            truth = _read(one.files.get("truth"), "L")
            for column, kind in enumerate(columns):
                picture = _read(one.files.get(kind), "RGB" if kind == "image" else "L")
                if picture is None:
                    words.append((row, column, "not there"))
                    continue
                sheet.put(row, column, _tile(picture))
                if kind in PARTS and truth is not None and truth.shape == picture.shape:
                    words.append((row, column, f"MAE {mean_absolute_error(picture, truth):.3f}"))
        figure, axes = sheet.figure(run.name, above=50, left=28)
        titles = {"image": "image", "truth": "truth", **{part: LOOKS[part].label for part in PARTS}}
        for column, kind in enumerate(columns):
            axes.text((column + 0.5) * sheet.width, -7, titles[kind], ha="center", va="bottom", fontsize=8)
        for row, column, text in words:
            axes.text(*sheet.below(row, column, 0), text, ha="center", va="top", fontsize=6.5)
        for row, one in enumerate(examples):
            side = f"{one.kind}: {shorten(one.name, 10)}" if kinds else shorten(one.name, 16)
            place = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 6.5}
            axes.text(-4, row * sheet.height + TILE / 2, plain(side), **place)
    return figure


def classes_figure(run: Run, examples: Sequence[Example], kinds: bool = False) -> Figure:
    """The images, and below each its class, what each model says and how surely; ``kinds`` as for
    :func:`maps_figure`."""
    parts = [part for part in PARTS if any(part in one.said for one in examples)]
    words = [_words(one, parts, kinds) for one in examples]
    columns = min(4, len(examples))
    with styled():
        # Seven pixels are enough for most letters at this size.
        width = max(TILE + 3 * GAP, 7 * max(len(text) for lines in words for text, _ in lines) + GAP)
        sheet = _Sheet(-(-len(examples) // columns), columns, width, len(parts) + 1)
        for place, one in enumerate(examples):
            picture = _read(one.files.get("image"), "RGB")
            if picture is not None:
                sheet.put(*divmod(place, columns), _tile(picture))
        figure, axes = sheet.figure(run.name, above=34, left=0)
        for place, lines in enumerate(words):
            for line, (text, right) in enumerate(lines):
                look = {"fontsize": 6.5, "color": "black" if right else WRONG, "weight": "normal" if line else "bold"}
                axes.text(*sheet.below(*divmod(place, columns), line), plain(text), ha="center", va="top", **look)
    return figure


def _words(one: Example, parts: Sequence[str], kinds: bool) -> list[tuple[str, bool]]:
    """What stands below an image, and whether it is right."""
    truth = one.said.get("truth")
    lines = [(f"{one.kind}, class {shorten(str(truth), 12)}" if kinds else f"class {shorten(str(truth), 18)}", True)]
    for part in (part for part in parts if isinstance(one.said.get(part), dict)):
        said, sure = one.said[part].get("class"), number(one.said[part].get("probability"))
        text = f"{LOOKS[part].label} {shorten(str(said), 14)}" + (f" {sure:.2f}" if sure is not None else "")
        lines.append((text if said == truth else f"✗ {text}", said == truth))
    return lines


def mean_absolute_error(picture: np.ndarray, truth: np.ndarray) -> float:
    """The MAE of a map against its mask, both uint8 [H, W], as the metrics measure it: the map is stretched to its own
    least and greatest level, and object is what is above 128 in the mask."""
    levels = picture.astype(np.float64) / 255
    spread = levels.max() - levels.min()
    if spread > 0:
        levels = (levels - levels.min()) / spread
    return float(np.abs(levels - (truth > 128)).mean())


def _read(path: Path | None, mode: str) -> np.ndarray | None:
    """The picture, or None where it is not there or cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def _tile(picture: np.ndarray) -> np.ndarray:
    """Fitted into a tile, RGB; what is small is magnified pixel by pixel."""
    image = Image.fromarray(picture).convert("RGB")
    ratio = TILE / max(image.size)
    size = tuple(max(1, round(side * ratio)) for side in image.size)
    tile = np.asarray(image.resize(size, Image.Resampling.NEAREST if ratio >= 3 else Image.Resampling.BICUBIC))
    # 52 levels of each colour: no eye tells in a tile this small, and the files are smaller by a third.
    return ((tile.astype(np.int64) + 2) // 5 * 5).astype(np.uint8)
