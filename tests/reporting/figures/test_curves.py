"""Precision-recall curves and confusion matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.figure_checks import assert_labelled, assert_readable, boxes, labels

from prunekit.reporting.figures.curves import confusion_figure, curve_figures, precision_recall_figure


def confusion(classes, seed=0, part="dense"):
    matrix = np.random.default_rng(seed).integers(0, 30, (classes, classes))
    matrix[0, -1] = 0 if classes > 1 else 5
    return {part: {"classes": [f"kind of thing {i}" for i in range(classes)], "confusion": matrix.tolist()}}


def test_precision_recall_lines_match_data(run):
    figure = precision_recall_figure(run.curves)
    left, right = figure.axes
    whole = [[line for line in axes.lines if len(line.get_xdata()) == 256] for axes in (left, right)]
    for part, pr, f in zip(("dense", "slim", "finetuned"), *whole, strict=True):
        held = run.curves[part]
        assert pr.get_xdata().tolist() == held["recall"] and pr.get_ydata().tolist() == held["precision"]
        assert f.get_ydata().tolist() == held["f"]
        assert [f.get_xdata()[0], f.get_xdata()[-1]] == [255, 0]
    best = [(line.get_xdata()[0], line.get_ydata()[0]) for line in right.lines if len(line.get_xdata()) == 1]
    assert [y for _, y in best] == [max(one["f"]) for one in run.curves.values()]
    texts = [text for text, _ in boxes(figure)]
    assert f"fine-tuned (max F {max(run.curves['finetuned']['f']):.3f})" in texts
    units = {"recall (0 to 1)", "precision (0 to 1)", "threshold (0 to 255)", "F-measure (0 to 1)"}
    assert labels(figure) == units
    assert_readable(figure)


def test_models_differ_in_marker_and_colour(run):
    lines = [line for line in precision_recall_figure(run.curves).axes[0].lines if len(line.get_xdata()) == 256]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 3


@pytest.mark.parametrize("classes", [1, 2, 10, 12, 13, 40, 200])
def test_confusion_matrix_is_readable_for_any_number_of_classes(run, classes):
    held = {**confusion(classes), **confusion(classes, 1, "finetuned")}
    figure = confusion_figure(held)
    assert_readable(figure)
    assert_labelled(figure)
    for axes, one in zip(figure.axes, held.values(), strict=False):
        matrix = np.array(one["confusion"])
        shares = 100 * matrix / matrix.sum(axis=1, keepdims=True)
        assert np.allclose(axes.images[0].get_array(), shares)
        written = {text.get_position(): text.get_text() for text in axes.texts}
        cells = {(int(x), int(y)): str(matrix[y, x]) for y, x in np.argwhere(matrix > 0)}
        assert written == (cells if classes <= 12 else {})
        assert f"{matrix.trace():,} of {matrix.sum():,} correct" in axes.get_title()


def test_class_without_images_has_empty_row(run):
    held = confusion(3)
    held["dense"]["confusion"][1] = [0, 0, 0]
    assert (confusion_figure(held).axes[0].images[0].get_array()[1] == 0).all()


def test_finetuned_model_replaces_slim_in_confusion(run):
    def panels(*parts):
        held = {part: confusion(3, part=part)[part] for part in parts}
        (drawing,) = curve_figures(replace(run, curves=held))
        return [axes.get_title().partition(",")[0] for axes in drawing.figure.axes[:-1]]

    assert panels("dense", "slim") == ["dense", "slim"]
    assert panels("dense", "slim", "finetuned") == ["dense", "fine-tuned"]


@pytest.mark.parametrize("curves", [{}, {"dense": {}}, {"dense": {"precision": [], "recall": [], "f": []}}])
def test_no_figure_without_curves(run, curves):
    assert list(curve_figures(replace(run, curves=curves))) == []
