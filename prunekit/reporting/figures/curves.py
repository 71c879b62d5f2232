"""Figures of predictions: precision, recall and F over all thresholds, and confusion matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from prunekit.reporting.figures import style
from prunekit.reporting.figures.style import ReportFigure, escape_text, points, shorten, style_axes
from prunekit.reporting.loader import MODELS, Run

MAX_COUNTED = 12  # classes; with more, counts are shown by color only
MAX_NAMED = 30  # classes with names at the axes of a matrix


def curve_figures(run: Run) -> Iterator[ReportFigure]:
    """Yield the figures of a run's curves; none before the run has been evaluated."""
    curves = {model: run.curves[model] for model in MODELS if model in run.curves}
    sweeps = {
        model: curve for model, curve in curves.items() if all(curve.get(k) for k in ("precision", "recall", "f"))
    }
    if sweeps:
        yield ReportFigure(
            "precision_recall",
            "Precision, recall and F",
            "Precision and recall, averaged over the validation set, at each of the 256 thresholds of a map, and the "
            "F-measure (β² = 0.3) of these averages; the larger marker is its maximum.",
            precision_recall_figure(sweeps),
        )
    confusion = {
        m: curve for m, curve in curves.items() if curve.get("confusion") and any(map(any, curve["confusion"]))
    }
    if "finetuned" in confusion:
        confusion.pop("slim", None)
    if confusion:
        yield ReportFigure(
            "confusion",
            "Confusion",
            "Validation images by true class (row) and predicted class (column); the color is the share of the row.",
            confusion_figure(confusion),
        )


def precision_recall_figure(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Plot precision against recall, and F against the threshold, a line for each model.

    Args:
        curves: model → ``precision``, ``recall`` and ``f`` of equal length; index t is the threshold 255 - t.
    """
    with style.figure_style():
        figure = style.new_figure(7.5, 3.7)
        left, right = figure.subplots(1, 2)
        for index, (model, curve) in enumerate(curves.items()):
            look = style.MODEL_STYLES[model]
            precision, recall, f = (np.asarray(curve[key], float) for key in ("precision", "recall", "f"))
            thresholds = np.linspace(255, 0, len(f))
            best = int(f.argmax())
            # Few markers, at different positions for each model, for print in gray.
            line = {
                "color": look.color, "linestyle": look.dashes, "linewidth": 1.5, "zorder": 3 + index,
                "marker": look.marker, "markersize": 3.5, "markevery": (10 + 14 * index, 48),
            }  # fmt: skip
            left.plot(recall, precision, label=f"{look.label} (max F {f[best]:.3f})", **line)
            right.plot(thresholds, f, **line)
            for axes, x, y in ((left, recall, precision), (right, thresholds, f)):
                marker = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 8 + index}
                axes.plot(x[best], y[best], look.marker, color=look.color, **marker)
        left.set_xlabel("recall (0 to 1)")
        left.set_ylabel("precision (0 to 1)")
        left.set_xlim(-0.02, 1.02)
        right.set_xlabel("threshold (0 to 255)")
        right.set_ylabel("F-measure (0 to 1)")
        right.set_xlim(-5, 260)
        right.xaxis.set_major_locator(MultipleLocator(50))
        for axes in (left, right):
            axes.set_ylim(-0.02, 1.02)
            style_axes(axes, "both")
        columns = 1 if style.is_narrow(figure) else 3 if len(curves) < 4 else 2
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def confusion_figure(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw a confusion matrix for each model, with counts if there are few classes.

    Args:
        curves: model → ``classes`` and ``confusion``, [classes, classes]: number of images by true class (row) and
            predicted class (column).
    """
    count = max(len(curve["confusion"]) for curve in curves.values())
    side = float(np.clip(0.8 + 0.26 * count, 3.0, 4.2))
    longest = max(len(str(name)) for curve in curves.values() for name in curve.get("classes") or [count])
    margin = 0.07 * min(longest, 18)  # inches
    with style.figure_style():
        figure = style.new_figure(max(5.0, side * len(curves) + 1.2 + margin), side + 0.3 + margin)
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False).ravel()
        for axes, (model, curve) in zip(panels, curves.items(), strict=True):
            matrix = np.asarray(curve["confusion"], np.int64)
            shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
            image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
            axes.set_title(f"{style.MODEL_STYLES[model].label}, {matrix.trace():,} of {matrix.sum():,} correct")
            _label_classes(axes, [str(name) for name in curve.get("classes") or range(len(matrix))])
            for row, column in np.argwhere(matrix > 0) if count <= MAX_COUNTED else ():
                color = "white" if shares[row, column] > 55 else "black"
                text = f"{matrix[row, column]}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=points(7))
        panels[0].set_ylabel("true class")
        bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
        bar.set_label("share of the row (%)")
    return figure


def _label_classes(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // MAX_NAMED)
    positions = range(0, len(names), step)
    labels = [escape_text(shorten(names[position], 18)) for position in positions]
    size = points(8 if len(labels) <= 12 else 6)
    axes.set_xticks(positions, labels, rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=size)
    axes.set_yticks(positions, labels, fontsize=size)
    axes.set_xlabel(f"predicted class{style.every_nth(step, 'named')}")
