"""Checks for every figure: no text is cut off or overlaps another, every axis is labelled."""

from __future__ import annotations

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from prunekit.reporting.figures.style import figure_style, fix_layout


def boxes(figure: Figure) -> list[tuple[str, np.ndarray]]:
    """Return (text, [left, bottom, right, top] in pixels) of all visible texts."""
    with figure_style():
        fix_layout(figure)
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        hidden = {id(text) for axes in figure.axes if not axes.axison for text in axes.xaxis.findobj(Text)}
        hidden |= {id(text) for axes in figure.axes if not axes.axison for text in axes.yaxis.findobj(Text)}
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            hidden |= {id(text) for text in _out_of_view(axis)}
        return [
            (text.get_text(), np.array(text.get_window_extent(renderer).extents))
            for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and id(text) not in hidden
        ]


def _out_of_view(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    room = 1e-6 * (high - low)
    ticks = [*axis.majorTicks, *axis.minorTicks]
    drawn = {id(tick) for tick in [*axis.get_major_ticks(len(axis.get_majorticklocs()))]}
    return [
        text
        for tick in ticks
        for text in (tick.label1, tick.label2)
        if not (low - room <= tick.get_loc() <= high + room) or id(tick) not in drawn
    ]


def assert_readable(figure: Figure) -> None:
    """Check that no text exceeds the canvas or overlaps another by more than a pixel."""
    written = boxes(figure)
    width, height = figure.bbox.size
    for text, (left, bottom, right, top) in written:
        assert left >= -1 and bottom >= -1 and right <= width + 1 and top <= height + 1, f"{text!r} is cut off"
    corners = np.array([box for _, box in written])
    low, high = corners[:, :2], corners[:, 2:]
    shared = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    for one, other in np.argwhere(np.triu((shared > 1).all(axis=2), 1)):
        raise AssertionError(f"{written[one][0]!r} overlaps {written[other][0]!r}")


def labels(figure: Figure) -> set[str]:
    """Return the labels of all axes and of the figure."""
    said = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
    said |= {figure.get_supxlabel(), figure.get_supylabel()}
    return said - {""}


def assert_labelled(figure: Figure) -> None:
    """Check that each axis with ticks has a label: its own, a shared one or that of the figure."""
    for axes in (axes for axes in figure.axes if axes.axison):
        for which, whole in (("x", figure.get_supxlabel()), ("y", figure.get_supylabel())):
            group = getattr(axes, f"get_shared_{which}_axes")().get_siblings(axes)
            told = [getattr(one, f"get_{which}label")() for one in group]
            ticks = [t for t in getattr(axes, f"{which}axis").get_ticklabels() if t.get_text()]
            assert any(told) or whole or not ticks, f"an axis {which} of {axes.get_title()!r} has no label"
