"""Trade-off figures: Pareto front, positions of markers and names."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from helpers.figure_checks import assert_readable, boxes
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import FancyArrowPatch

from prunekit.reporting.figures import report_figures
from prunekit.reporting.figures.tradeoff import pareto_front, totals_figure, tradeoff_figures
from prunekit.reporting.loader import load_run

levels = st.integers(0, 6)


def spread(run, count, seed=0):
    """Runs with random models."""
    random = np.random.default_rng(seed)
    runs = []
    for index in range(count):
        summary = deepcopy(run.summary)
        for part in ("dense", "slim", "finetuned"):
            summary[part]["params"] = int(random.integers(10_000, 100_000))
            summary[part]["metrics"]["max_f"] = float(random.uniform(0.7, 0.95))
        runs.append(replace(run, name=f"run-{index:02d}", summary=summary))
    return runs


def drawn(runs, name):
    return next(drawing for drawing in tradeoff_figures(runs) if drawing.name == name).figure


def markers(figure):
    """Return (x, y) of each model's marker."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in figure.axes[0].lines
        if line.get_linestyle() == "None" and line.get_markerfacecolor() != "none"
    ]


@given(st.lists(st.tuples(levels, levels), min_size=1, max_size=12))
def test_pareto_front_is_the_nondominated_set(points):
    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    wanted = {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
    front = pareto_front([cost for cost, _ in points], [quality for _, quality in points])
    assert set(front) == wanted and len(front) == len(wanted)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_markers_match_data(run):
    runs = spread(run, 5)
    figure = drawn(runs, "tradeoff_params")
    wanted = [
        (one.summary[part]["params"], one.summary[part]["metrics"]["max_f"])
        for one in runs
        for part in ("dense", "slim", "finetuned")
    ]
    assert sorted(markers(figure)) == sorted(wanted)
    ring = next(line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none")
    front = pareto_front(*zip(*wanted, strict=True))
    assert list(zip(ring.get_xdata(), ring.get_ydata(), strict=True)) == [wanted[i] for i in front]
    assert figure.axes[0].get_xlabel() == "parameters"
    assert figure.axes[0].get_ylabel() == "max F-measure (higher is better)"


def test_lower_is_better_for_errors(run):
    runs = spread(run, 6)
    for one in runs:
        for part in ("dense", "slim", "finetuned"):
            one.summary[part]["metrics"] = {"mae": 1 - one.summary[part]["metrics"]["max_f"]}
    figure = drawn(runs, "tradeoff_params")
    points = markers(figure)
    ring = next(line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none")
    wanted = {p for p in points if not any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in points)}
    assert set(zip(ring.get_xdata(), ring.get_ydata(), strict=True)) == wanted
    assert "lower is better" in figure.axes[0].get_ylabel()


def test_macs_label_has_image_size(run):
    assert drawn([run], "tradeoff_macs").axes[0].get_xlabel() == "MACs (64×64)"
    both = [run, replace(run, name="other", size=(32, 32))]
    assert drawn(both, "tradeoff_macs").axes[0].get_xlabel() == "MACs (each at the image size of its run)"


def test_arrows_lead_from_dense_to_slim_to_finetuned(run):
    figure = drawn([run], "tradeoff_params")
    arrows = [patch._posA_posB for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    points = [(run.summary[m]["params"], run.summary[m]["metrics"]["max_f"]) for m in ("dense", "slim", "finetuned")]
    assert [list(map(tuple, arrow)) for arrow in arrows] == [[points[0], points[1]], [points[1], points[2]]]


@pytest.mark.parametrize("metric, best", [("max_f", 0.5), ("mae", 0.25)])
def test_trivial_predictor_is_a_line(run, metric, best):
    summary = deepcopy(run.summary)
    for model in ("dense", "slim", "finetuned"):
        summary[model]["metrics"] = {metric: 0.75 + summary[model]["params"] / 1e6}
    summary["reference"] = {"constant": {metric: 0.5}, "centre": {metric: 0.25}, "broken": {metric: None}}
    one = replace(run, summary=summary)
    figure = drawn([one], "tradeoff_params")
    (line,) = (line for line in figure.axes[0].lines if line.get_linestyle() == ":")
    assert set(line.get_ydata()) == {best}
    assert "trivial predictor" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert_readable(figure)
    # Of runs on other data, the predictors differ.
    other = deepcopy(summary)
    other["reference"] = {"constant": {metric: 0.625}}
    figure = drawn([one, replace(one, name="other", summary=other)], "tradeoff_params")
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]


def test_latency_is_compared_in_one_setting(run):
    figure = drawn([run], "tradeoff_latency")
    assert sorted(x for x, _ in markers(figure)) == [12.5, 20.0]
    label = figure.axes[0].get_xlabel()
    assert label.startswith("latency, median of one batch (ms)\neager, batch 1, 64×64") and "cpu" in label


def test_tasks_have_separate_figures(run):
    summary = {part: {**run.summary[part], "metrics": {"top1": 0.9}} for part in ("dense", "slim")}
    other = replace(run, name="digits", summary=summary)
    names = [drawing.name for drawing in tradeoff_figures([run, other])]
    assert names[:3] == ["tradeoff_params_max-f", "tradeoff_macs_max-f", "tradeoff_latency_max-f"]
    assert "tradeoff_params_top1" in names and names[-1] == "totals"


@pytest.mark.parametrize("count", [1, 3, 9, 30, 70])
def test_run_names_are_readable_for_any_number_of_runs(run, count):
    figure = drawn(spread(run, count, seed=count), "tradeoff_params")
    assert_readable(figure)
    texts = " ".join(text for text, _ in boxes(figure))
    assert all(f"run-{index:02d}" in texts for index in range(min(count, 60)))
    assert (f"and {count - 60} more" in texts) == (count > 60)


def test_models_without_numbers_are_left_out(run):
    summary = deepcopy(run.summary)
    del summary["slim"]["metrics"], summary["finetuned"]["params"]
    summary["dense"]["metrics"] = {"max_f": None, "mae": 0.1}
    names = [drawing.name for drawing in report_figures([replace(run, summary=summary)])]
    assert "tradeoff_params" not in names


def test_equal_models(run):
    summary = deepcopy(run.summary)
    summary["slim"] = summary["finetuned"] = {**summary["dense"], "metrics": {"max_f": 0.5}}
    assert_readable(drawn([replace(run, summary=summary)], "tradeoff_params"))


def heights(container):
    return [bar.get_height() for bar in container]


def test_totals_of_missing_models(run, make_run):
    other = load_run(make_run("part", stop="finetune"))
    upper, lower = totals_figure([run, other]).axes
    assert [len(c) for c in upper.containers] == [2, 2, 1]
    assert heights(lower.containers[0]) == [r.summary["dense"]["macs"] for r in (run, other)]


@pytest.mark.parametrize("count", [2, 9, 10, 90])
def test_totals_are_readable_for_many_runs(run, count):
    assert_readable(totals_figure(spread(run, count)))
