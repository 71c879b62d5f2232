"""How a model answers: precision, recall and F over all thresholds, and what is taken for what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from prunekit.reporting.figures.style import LOOKS, Drawing, new_figure, plain, quiet, shorten, styled
from prunekit.reporting.loader import PARTS, Run

WRITTEN = 12  # classes; of more the counts are shown by colour alone
NAMED = 30  # classes whose names stand at the axes of one matrix


def curve_drawings(run: Run) -> Iterator[Drawing]:
    """The drawings of a run's curves; none before it has been evaluated."""
    held = {part: run.curves[part] for part in PARTS if part in run.curves}
    swept = {part: one for part, one in held.items() if one.get("precision") and one.get("recall") and one.get("f")}
    if swept:
        yield Drawing(
            "precision_recall",
            "Precision, recall and F",
            "Precision and recall averaged over the validation set at each of the 256 levels at which a map can be "
            "cut, and the F-measure (β² = 0.3) of these averages; the larger marker is its maximum.",
            precision_recall_figure(run, swept),
        )
    confused = {part: one for part, one in held.items() if one.get("confusion") and any(map(any, one["confusion"]))}
    if confused:
        # Between dense and fine-tuned the slim model is a stage on the way.
        shown = {part: one for part, one in confused.items() if part != "slim" or "finetuned" not in confused}
        yield Drawing(
            "confusion",
            "Confusion",
            "Validation images by their class (row) and the class that the model names (column); the colour is the "
            "share of the row.",
            confusion_figure(run, shown),
        )


def precision_recall_figure(run: Run, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Precision against recall, and F against the level of the cut, a line for each model.

    Args:
        curves: model → ``precision``, ``recall`` and ``f`` of the same length; place t is the cut at level 255 - t.
    """
    with styled():
        figure = new_figure(7.5, 4.0, run.name)
        left, right = figure.subplots(1, 2)
        for index, (part, curve) in enumerate(curves.items()):
            look = LOOKS[part]
            precision, recall, f = (np.asarray(curve[key], float) for key in ("precision", "recall", "f"))
            levels = np.linspace(255, 0, len(f))
            best = int(f.argmax())
            # Few marks, each model's at places of its own, for print in grey.
            line = {
                "color": look.colour, "linestyle": look.dashes, "linewidth": 1.5, "zorder": 3 + index,
                "marker": look.marker, "markersize": 3.5, "markevery": (10 + 14 * index, 48),
            }  # fmt: skip
            left.plot(recall, precision, label=f"{look.label} (max F {f[best]:.3f})", **line)
            right.plot(levels, f, **line)
            for axes, x, y in ((left, recall, precision), (right, levels, f)):
                mark = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 8 + index}
                axes.plot(x[best], y[best], look.marker, color=look.colour, **mark)
        left.set_xlabel("recall (0 to 1)")
        left.set_ylabel("precision (0 to 1)")
        left.set_xlim(-0.02, 1.02)
        right.set_xlabel("level of the cut (0 to 255)")
        right.set_ylabel("F-measure (0 to 1)")
        right.set_xlim(-5, 260)
        right.xaxis.set_major_locator(MultipleLocator(50))
        for axes in (left, right):
            axes.set_ylim(-0.02, 1.02)
            quiet(axes, "both")
        figure.legend(loc="outside lower center", ncols=3 if len(curves) < 4 else 2, frameon=False)
    return figure


def confusion_figure(run: Run, curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A confusion matrix for each model, the counts written where there are few classes.

    Args:
        curves: model → ``classes`` and ``confusion``, (classes, classes): images of the row's class taken for the
            column's.
    """
    count = max(len(one["confusion"]) for one in curves.values())
    side = float(np.clip(0.8 + 0.26 * count, 3.0, 4.2))
    longest = max(len(str(name)) for one in curves.values() for name in one.get("classes") or [count])
    names = 0.07 * min(longest, 18)  # inches
    with styled():
        figure = new_figure(max(5.0, side * len(curves) + 1.2 + names), side + 0.6 + names, run.name)
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False).ravel()
        for axes, (part, one) in zip(panels, curves.items(), strict=True):
            matrix = np.asarray(one["confusion"], np.int64)
            names = [str(name) for name in one.get("classes") or range(len(matrix))]
            totals = matrix.sum(axis=1, keepdims=True)
            shares = 100 * matrix / np.maximum(totals, 1)
            image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
            axes.set_title(f"{LOOKS[part].label}, {matrix.trace():,} of {matrix.sum():,} right")
            _class_axes(axes, names)
            if count <= WRITTEN:
                _write_counts(axes, matrix, shares)
        panels[0].set_ylabel("class of the image")
        bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
        bar.set_label("share of the row (%)")
    return figure


def _class_axes(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // NAMED)
    places = range(0, len(names), every)
    told = [plain(shorten(names[place], 18)) for place in places]
    size = 8 if len(told) <= 12 else 6
    turned = max(map(len, told)) > 2
    axes.set_xticks(places, told, rotation=90 if turned else 0, fontsize=size)
    axes.set_yticks(places, told, fontsize=size)
    some = f", every {every}{'nd' if every == 2 else 'rd' if every == 3 else 'th'} is named" if every > 1 else ""
    axes.set_xlabel(f"class that the model names{some}")


def _write_counts(axes: Axes, matrix: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(matrix > 0):
        colour = "white" if shares[row, column] > 55 else "black"
        axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", color=colour, fontsize=7)
