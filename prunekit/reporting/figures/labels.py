"""Labels beside points, none on top of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from prunekit.reporting.figures.style import settle

RADII = (7, 12, 20, 32, 46, 64)  # points (1/72 inch)
# Right and left first: there a label and its point are read as one.
ANGLES = (0, 180, 40, -40, 140, -140, 90, -90, 65, -65, 115, -115)
GAP = 1.5  # points between two labels


def place_labels(
    axes: Axes,
    at: Sequence[tuple[float, float]],
    texts: Sequence[str],
    obstacles: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]] = (),
    reach: float = RADII[-1],
) -> list[bool]:
    """Write each text near its point, within the axes, over no point and no other text.

    The layout of the figure is fixed by this: a later change of size would move the labels onto each other.

    Args:
        at: the points, in data coordinates.
        obstacles: all points that are drawn, in data coordinates.
        line: corners of a line along the axes that no text may stand on, in data coordinates.
        reach: how far from its point a text may stand, in 1/72 inch.

    Returns:
        For each text whether there was room for it; what has none is not written.
    """
    figure = axes.figure
    settle(figure)
    scale = figure.dpi / 72
    room = axes.get_window_extent()
    pixels = axes.transData.transform(np.asarray(obstacles, float).reshape(-1, 2))
    half = 5.5 * scale
    boxes = np.concatenate([pixels - half, pixels + half], axis=1)
    if len(line) > 1:
        corners = axes.transData.transform(np.asarray(line, float))
        ends = np.minimum(corners[:-1], corners[1:]), np.maximum(corners[:-1], corners[1:])
        boxes = np.concatenate([boxes, np.concatenate([ends[0] - scale, ends[1] + scale], axis=1)])
    done = []
    for (x, y), text in zip(at, texts, strict=True):
        label = axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, zorder=5)
        width, height = label.get_window_extent().size
        origin = axes.transData.transform((x, y))
        spot = _free(origin, (width, height), boxes, room, scale, reach)
        done.append(spot is not None)
        if spot is None:
            label.remove()
            continue
        radius, box = spot
        _move(label, (box[:2] - origin) / scale)
        boxes = np.concatenate([boxes, [[*(box[:2] - GAP * scale), *(box[2:] + GAP * scale)]]])
        if radius > RADII[1]:
            near = np.clip(origin, box[:2], box[2:])
            leader = axes.transData.inverted().transform([origin, near])
            axes.plot(*leader.T, color="0.6", linewidth=0.7, zorder=1.2)
    return done


def _free(
    origin: np.ndarray, size: tuple[float, float], boxes: np.ndarray, room: Bbox, scale: float, reach: float
) -> tuple[float, np.ndarray] | None:
    """The nearest place for a text, as (radius, [left, bottom, right, top] in pixels)."""
    width, height = size
    for radius in (radius for radius in RADII if radius <= reach):
        for angle in np.deg2rad(ANGLES):
            toward = np.array([np.cos(angle), np.sin(angle)])
            # The side of the text that faces the point is what stands at the radius.
            centre = origin + toward * radius * scale + np.round(toward, 1) * np.array([width, height]) / 2
            box = np.concatenate([centre - np.array(size) / 2, centre + np.array(size) / 2])
            within = box[0] >= room.x0 and box[1] >= room.y0 and box[2] <= room.x1 and box[3] <= room.y1
            if within and not _overlaps(box, boxes):
                return radius, box
    return None


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> bool:
    return bool(((box[:2] < boxes[:, 2:]) & (boxes[:, :2] < box[2:])).all(axis=1).any())


def _move(label: Annotation, offset: np.ndarray) -> None:
    # The box that was measured begins below the baseline of the text.
    label.set_verticalalignment("bottom")
    label.set_position(tuple(offset))
