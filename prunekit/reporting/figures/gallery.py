"""Galleries: validation images with the predictions of each model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from prunekit.reporting.figures.run_data import finite_number
from prunekit.reporting.figures.style import (
    MODEL_STYLES,
    ReportFigure,
    escape_text,
    figure_style,
    pixel_figure,
    shorten,
)
from prunekit.reporting.loader import MODELS, GalleryImage, Run

MAX_FIXED = 8  # images shown of those that every run shows
TILE, GAP, LINE = 84, 6, 14  # pixels
DPI = 120  # at 150, a gallery of photographs would take half a megabyte
WRONG = "#B04A00"


def gallery_figures(run: Run) -> Iterator[ReportFigure]:
    """Yield the galleries of a run: images that are the same for every run on the data, and the best and worst."""
    images = [image for image in run.gallery if "image" in image.files]
    fixed = [image for image in images if image.fixed]
    fixed = [fixed[i] for i in np.unique(np.linspace(0, len(fixed) - 1, min(MAX_FIXED, len(fixed))).astype(int))]
    extremes = [image for kind in ("best", "worst") for image in images if image.kind == kind]
    has_maps = any("truth" in image.files for image in images)
    draw = maps_figure if has_maps else classes_figure
    legend = "The mean absolute error (MAE, 0 to 1) is below each map." if has_maps else "✗ marks wrong classes."
    if fixed:
        yield ReportFigure(
            "gallery",
            "Gallery",
            f"{len(fixed)} validation images at equal distances, the same for every run on these data. {legend}",
            draw(fixed),
        )
    if extremes:
        measure = "MAE" if has_maps else "probability of the true class"
        yield ReportFigure(
            "gallery_extremes",
            "Best and worst cases",
            f"The validation images with the best and the worst results of the last model by {measure}. {legend}",
            draw(extremes, show_kind=True),
        )


class _Sheet:
    """A grid of tiles with lines of text below them, drawn pixel by pixel on white; ``width`` is that of a cell."""

    def __init__(self, rows: int, columns: int, width: int, lines: int):
        self.width, self.height = width, TILE + LINE * lines + GAP
        self.pixels = np.full((rows * self.height, columns * width, 3), 255, np.uint8)

    def put(self, row: int, column: int, tile: np.ndarray) -> None:
        """Center a tile, no larger than ``TILE``, in its cell."""
        height, width = tile.shape[:2]
        top = row * self.height + (TILE - height) // 2
        left = column * self.width + (self.width - width) // 2
        self.pixels[top : top + height, left : left + width] = tile

    def text_position(self, row: int, column: int, line: int) -> tuple[float, float]:
        """Return the middle of the upper edge of a text line."""
        return (column + 0.5) * self.width, row * self.height + TILE + line * LINE + 2

    def figure(self, top: int, left: int) -> tuple[Figure, Axes, float]:
        """Return a figure of the sheet with margins at the top and the left, its axes and the size of its texts."""
        height, width = self.pixels.shape[0] + top, self.pixels.shape[1] + left
        figure = pixel_figure(width, height, DPI)
        axes = figure.add_axes((left / width, 0, 1 - left / width, 1 - top / height))
        extent = (0, self.pixels.shape[1], self.pixels.shape[0], 0)
        axes.imshow(self.pixels, interpolation="none", aspect="auto", extent=extent)
        axes.set_axis_off()
        return figure, axes, 6.5 * figure.get_figwidth() * DPI / width


def maps_figure(images: Sequence[GalleryImage], show_kind: bool = False) -> Figure:
    """Draw a row for each image: the image, the ground truth, and the map of each model with its error.

    With ``show_kind``, the name includes whether it is one of the best or the worst.
    """
    columns = ["image", "truth", *(model for model in MODELS if any(model in image.files for image in images))]
    with figure_style():
        sheet = _Sheet(len(images), len(columns), TILE + GAP, 1)
        texts: list[tuple[int, int, str]] = []
        for row, image in enumerate(images):
            truth = _read(image.files.get("truth"), "L")
            for column, part in enumerate(columns):
                picture = _read(image.files.get(part), "RGB" if part == "image" else "L")
                if picture is None:
                    texts.append((row, column, "missing"))
                    continue
                sheet.put(row, column, _tile(picture))
                if part in MODELS and truth is not None and truth.shape == picture.shape:
                    texts.append((row, column, f"MAE {mean_absolute_error(picture, truth):.3f}"))
        figure, axes, size = sheet.figure(top=28, left=28)
        for column, part in enumerate(columns):
            title = MODEL_STYLES[part].label if part in MODELS else part
            axes.text((column + 0.5) * sheet.width, -7, title, ha="center", va="bottom", fontsize=size * 8 / 6.5)
        for row, column, text in texts:
            axes.text(*sheet.text_position(row, column, 0), text, ha="center", va="top", fontsize=size)
        for row, image in enumerate(images):
            name = f"{image.kind}: {shorten(image.name, 10)}" if show_kind else shorten(image.name, 16)
            style = {"rotation": 90, "ha": "right", "va": "center", "fontsize": size}
            axes.text(-4, row * sheet.height + TILE / 2, escape_text(name), **style)
    return figure


def classes_figure(images: Sequence[GalleryImage], show_kind: bool = False) -> Figure:
    """Draw the images with the true class and each model's prediction and probability below; as :func:`maps_figure`."""
    models = [model for model in MODELS if any(model in image.labels for image in images)]
    texts = [_prediction_texts(image, models, show_kind) for image in images]
    columns = min(4, len(images))
    with figure_style():
        # At this size, most letters are at most seven pixels wide.
        width = max(TILE + 3 * GAP, 7 * max(len(text) for lines in texts for text, _ in lines) + GAP)
        sheet = _Sheet(-(-len(images) // columns), columns, width, len(models) + 1)
        cells = [divmod(index, columns) for index in range(len(images))]
        for cell, image in zip(cells, images, strict=True):
            picture = _read(image.files.get("image"), "RGB")
            if picture is not None:
                sheet.put(*cell, _tile(picture))
        figure, axes, size = sheet.figure(top=6, left=0)
        for cell, lines in zip(cells, texts, strict=True):
            for line, (text, correct) in enumerate(lines):
                style = {"color": "black" if correct else WRONG, "weight": "normal" if line else "bold"}
                position = sheet.text_position(*cell, line)
                axes.text(*position, escape_text(text), ha="center", va="top", fontsize=size, **style)
    return figure


def _prediction_texts(image: GalleryImage, models: Sequence[str], show_kind: bool) -> list[tuple[str, bool]]:
    """Return the lines below an image, and whether each is correct."""
    truth = image.labels.get("truth")
    name = shorten(str(truth), 12 if show_kind else 18)
    lines = [(f"{image.kind}, class {name}" if show_kind else f"class {name}", True)]
    for model in (model for model in models if isinstance(image.labels.get(model), dict)):
        label = image.labels[model].get("class")
        probability = finite_number(image.labels[model].get("probability"))
        text = f"{MODEL_STYLES[model].label} {shorten(str(label), 14)}"
        text += f" {probability:.2f}" if probability is not None else ""
        lines.append((text if label == truth else f"✗ {text}", label == truth))
    return lines


def mean_absolute_error(saliency: np.ndarray, mask: np.ndarray) -> float:
    """Return the MAE of a map, uint8 [H, W], against its mask, as in :mod:`prunekit.tasks.saliency_metrics`.

    The map is scaled to its own range, and mask values above 128 are foreground.
    """
    levels = saliency.astype(np.float64) / 255
    spread = levels.max() - levels.min()
    if spread > 0:
        levels = (levels - levels.min()) / spread
    return float(np.abs(levels - (mask > 128)).mean())


def _read(path: Path | None, mode: str) -> np.ndarray | None:
    """Return the picture, or None if it is missing or cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def _tile(picture: np.ndarray) -> np.ndarray:
    """Resize a picture to fit a tile, RGB; small ones are magnified without interpolation."""
    image = Image.fromarray(picture).convert("RGB")
    ratio = TILE / max(image.size)
    size = tuple(max(1, round(side * ratio)) for side in image.size)
    tile = np.asarray(image.resize(size, Image.Resampling.NEAREST if ratio >= 3 else Image.Resampling.BICUBIC))
    # 52 levels of each color make the files smaller by a third, without a visible difference at this size.
    return ((tile.astype(np.int64) + 2) // 5 * 5).astype(np.uint8)
