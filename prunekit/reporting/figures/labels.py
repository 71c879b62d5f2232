"""Place labels next to points without overlaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from prunekit.reporting.figures.style import fix_layout, points

RADII = (7, 12, 20, 32, 46, 64)  # points (1/72 inch)
# To the right and left first, where a label is read together with its point.
ANGLES = (0, 180, 40, -40, 140, -140, 90, -90, 65, -65, 115, -115)
GAP = 1.5  # points between two labels


def place_labels(
    axes: Axes,
    anchors: Sequence[tuple[float, float]],
    texts: Sequence[str],
    obstacles: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]] = (),
    max_radius: float = RADII[-1],
) -> list[bool]:
    """Write each text near its point, within the axes, over no obstacle and no other text.

    Fixes the layout of the figure, as resizing would move the labels.

    Args:
        anchors, texts: a text for each point, in data coordinates.
        obstacles: all points that are drawn.
        line: corners of a line along the axes that no text may cover.
        max_radius: largest distance of a text from its point, in 1/72 inch.

    Returns:
        For each text whether there was room for it; otherwise it is not written.
    """
    fix_layout(axes.figure)
    scale = axes.figure.dpi / 72
    bounds = axes.get_window_extent()
    pixels = axes.transData.transform(np.asarray(obstacles, float).reshape(-1, 2))
    half = 5.5 * scale
    boxes = np.concatenate([pixels - half, pixels + half], axis=1)
    if len(line) > 1:
        corners = axes.transData.transform(np.asarray(line, float))
        low, high = np.minimum(corners[:-1], corners[1:]), np.maximum(corners[:-1], corners[1:])
        boxes = np.concatenate([boxes, np.concatenate([low - scale, high + scale], axis=1)])
    placed = []
    for point, text in zip(anchors, texts, strict=True):
        label = axes.annotate(text, point, xytext=(0, 0), textcoords="offset points", fontsize=points(8), zorder=5)
        origin = axes.transData.transform(point)
        free = _find_free_box(origin, label.get_window_extent().size, boxes, bounds, scale, max_radius)
        placed.append(free is not None)
        if free is None:
            label.remove()
            continue
        radius, box = free
        # The measured box starts below the baseline of the text.
        label.set_verticalalignment("bottom")
        label.set_position(tuple((box[:2] - origin) / scale))
        boxes = np.concatenate([boxes, [[*(box[:2] - GAP * scale), *(box[2:] + GAP * scale)]]])
        if radius > RADII[1]:
            leader = axes.transData.inverted().transform([origin, np.clip(origin, box[:2], box[2:])])
            axes.plot(*leader.T, color="0.6", linewidth=0.7, zorder=1.2)
    return placed


def _find_free_box(
    origin: np.ndarray, size: np.ndarray, boxes: np.ndarray, bounds: Bbox, scale: float, max_radius: float
) -> tuple[float, np.ndarray] | None:
    """Return the nearest free box for a text as (radius, [left, bottom, right, top] in pixels)."""
    for radius in (radius for radius in RADII if radius <= max_radius):
        for angle in np.deg2rad(ANGLES):
            direction = np.array([np.cos(angle), np.sin(angle)])
            # The side of the text that faces the point is at the radius.
            center = origin + direction * radius * scale + np.round(direction, 1) * size / 2
            box = np.concatenate([center - size / 2, center + size / 2])
            inside = box[0] >= bounds.x0 and box[1] >= bounds.y0 and box[2] <= bounds.x1 and box[3] <= bounds.y1
            if inside and not ((box[:2] < boxes[:, 2:]) & (boxes[:, :2] < box[2:])).all(axis=1).any():
                return radius, box
    return None
