"""Figures of training: lines match the data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.figure_checks import assert_labelled, assert_readable
from matplotlib.colors import to_rgba

from prunekit.reporting.figures.run_data import gate_history, group_by_stage
from prunekit.reporting.figures.training import (
    ALIVE,
    DEAD,
    MAX_LINES,
    alive_figure,
    gates_figure,
    gates_map,
    training_figure,
    training_figures,
)

LIMIT = 0.02


def with_gates(run, values, norms):
    columns = pd.MultiIndex.from_tuples([(norm, i) for i, norm in enumerate(norms)], names=["norm", "channel"])
    table = pd.DataFrame(np.asarray(values, np.float32), index=pd.RangeIndex(1, len(values) + 1), columns=columns)
    return replace(run, gates=table)


def random_gates(run, epochs, channels, stages, seed=0):
    random = np.random.default_rng(seed)
    values = np.exp(random.normal(np.log(LIMIT), 2, (epochs, channels * stages)))
    return with_gates(run, values, [f"stage{i // channels}.norm" for i in range(channels * stages)])


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_training_lines_match_data(run):
    run = replace(run, metrics=run.metrics.assign(**{"lambda": run.metrics["epoch"] + 2.0}))
    figure = training_figure(run)
    panels = np.array(figure.axes).reshape(4, 2)
    assert [axes.get_title() for axes in panels[0]] == ["sparse training", "fine-tuning"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == [
        "loss", "penalty (with λ)", "λ (weight)", "metrics (validation)",
    ]  # fmt: skip
    for place, stage in enumerate(("train", "finetune")):
        table = run.metrics[run.metrics["stage"] == stage]
        assert lines(panels[0, place])["loss"].tolist() == table["loss"].tolist()
        assert lines(panels[2, place])["λ"].tolist() == table["lambda"].tolist()
        assert lines(panels[3, place])["mean absolute error"].tolist() == table["metrics.mae"].tolist()
    assert {axes.get_xlabel() for axes in panels[-1]} == {"epoch"}


def test_constant_rows_are_in_the_caption(run):
    drawing = next(training_figures(run))
    assert "λ 30" in drawing.caption and "λ (weight)" not in [axes.get_ylabel() for axes in drawing.figure.axes]
    table = run.metrics.assign(**{"metrics.mae": 0.1, "metrics.max_f": 0.5, "loss": 0.25})
    drawing = next(training_figures(replace(run, metrics=table)))
    assert {axes.get_ylabel() for axes in drawing.figure.axes} == {"penalty (with λ)"}
    assert "loss 0.25, λ 30, mean absolute error 0.1, max F-measure 0.5" in drawing.caption


def test_fine_tuning_has_its_own_axis(run):
    table = run.metrics.assign(loss=np.where(run.metrics["stage"] == "train", run.metrics["loss"] + 9, 0.25))
    train, finetune = training_figure(replace(run, metrics=table)).axes[:2]
    assert train.get_ylim()[0] > 8 and finetune.get_ylim()[1] < 1


def test_stage_without_decay_is_labelled(run):
    table = run.metrics.assign(penalty=np.where(run.metrics["stage"] == "train", run.metrics["penalty"] * 1e5, 0.0))
    panels = np.array(training_figure(replace(run, metrics=table)).axes).reshape(3, 2)
    assert [text.get_text() for text in panels[1, 1].texts] == ["no decay"]
    assert not panels[1, 0].texts


@pytest.mark.parametrize("columns", [["stage"], ["epoch", "loss"], []])
def test_no_training_figure_without_required_columns(run, columns):
    drawings = training_figures(replace(run, metrics=run.metrics[columns]))
    assert "training" not in [drawing.name for drawing in drawings]


def test_missing_losses_leave_a_gap(run):
    table = run.metrics.assign(loss=[None, *run.metrics["loss"][1:]])
    assert np.isnan(lines(training_figure(replace(run, metrics=table)).axes[0])["loss"][0])


@pytest.mark.parametrize("seed", range(5))
def test_alive_is_share_above_threshold(run, seed):
    table = random_gates(run, 7, 20, 3, seed)
    axes = alive_figure(table, gate_history(table)).axes[0]
    for stage in range(3):
        values = table.gates[f"stage{stage}.norm"].to_numpy()
        assert np.allclose(lines(axes)[f"stage{stage} (20 gates)"], [100 * np.mean(row > LIMIT) for row in values])
    train = run.metrics[run.metrics["stage"] == "train"]
    assert np.allclose(lines(axes)["all channels"], 100 * train["alive"] / train["of"])
    assert axes.get_ylabel() == "alive (%)" and str(LIMIT) in axes.get_title()


@pytest.mark.parametrize("channels", [5, 300])
def test_gates_are_grouped_by_stage_and_coloured_by_last_value(run, channels):
    table = random_gates(run, 6, channels, 2)
    figure = gates_figure(table, gate_history(table))
    for stage, axes in enumerate(figure.axes):
        values = table.gates[f"stage{stage}.norm"].to_numpy()
        (collection,) = axes.collections
        segments = collection.get_segments()
        assert len(segments) == min(channels, MAX_LINES)
        colours = {True: to_rgba(ALIVE), False: to_rgba(DEAD)}
        for segment, colour in zip(segments, collection.get_colors(), strict=True):
            assert tuple(colour) == colours[bool(segment[-1, 1] > LIMIT)]
            assert segment[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
        share = np.mean([segment[-1, 1] > LIMIT for segment in segments])
        assert abs(share - (values[-1] > LIMIT).mean()) < 1.5 / len(segments)
        median = axes.lines[0].get_ydata()
        assert np.allclose(median, np.median(values, axis=1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 1), (40, 50, 3), (900, 400, 4)])
def test_gates_map_has_all_gates_or_means(run, shape):
    table = random_gates(run, *shape)
    figure = gates_map(table, gate_history(table))
    pixels = figure.axes[0].images[0].get_array()
    epochs, count = shape[0], shape[1] * shape[2]
    assert pixels.shape == (min(count, 700), min(epochs, 400))
    values = np.log10(np.clip(table.gates.to_numpy(), LIMIT / 1e3, None))
    # Means of parts of nearly equal size preserve the overall mean.
    assert pixels.mean() == pytest.approx(values.mean(), rel=0.01)
    if (count, epochs) == pixels.shape:
        assert np.allclose(np.sort(pixels[:, -1]), np.sort(values[-1]), atol=1e-5)
    assert f"{count:,} gates" in figure.axes[0].get_title()
    assert_readable(figure)
    assert_labelled(figure)


def with_target(run, **kept):
    recipe = {**run.recipe, "target": {"params": 5000, "macs": None}}
    return replace(run, recipe=recipe, summary={**run.summary, "kept": {**run.summary["kept"], **kept}})


def test_gates_of_a_target_are_divided_by_the_cut_that_was_made(run):
    table = with_target(random_gates(run, 6, 5, 2), cut=0.25)
    drawings = {drawing.name: drawing for drawing in training_figures(table)}
    for stage, axes in enumerate(drawings["gates"].figure.axes):
        values = table.gates[f"stage{stage}.norm"].to_numpy()
        ends = [segment[-1, 1] > 0.25 for segment in axes.collections[0].get_segments()]
        blue = [tuple(colour) == to_rgba(ALIVE) for colour in axes.collections[0].get_colors()]
        assert blue == ends and sum(ends) == (values[-1] > 0.25).sum()
        assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0.25]
    texts = [text.get_text() for text in drawings["gates"].figure.legends[0].get_texts()]
    assert "cut 0.25" in texts and not any("threshold" in text for text in texts)
    alive = drawings["alive"].figure.axes[0]
    assert np.allclose(lines(alive)["stage0 (5 gates)"], 100 * (table.gates["stage0.norm"].to_numpy() > 0.25).mean(1))
    # The epochs' counts of living channels refer to the threshold.
    assert "all channels" not in lines(alive) and "cut 0.25" in alive.get_title()
    assert "above the cut" in drawings["gates_map"].caption


@pytest.mark.parametrize(
    "change",
    [
        {"target": {"macs_ratio": 0.5}},
        {"slim": {"importance": {"name": "taylor"}, "threshold": LIMIT}},
        {"slim": {"importance": "magnitude", "threshold": LIMIT}},
    ],
)
def test_no_threshold_is_drawn_where_none_was_used(run, change):
    table = random_gates(run, 6, 5, 2)
    table = replace(table, recipe={**table.recipe, **change})
    drawings = {drawing.name: drawing for drawing in training_figures(table)}
    assert "alive" not in drawings and "above" not in drawings["gates_map"].caption
    assert not [line for axes in drawings["gates"].figure.axes for line in axes.lines if line.get_linestyle() == "--"]


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.5, LIMIT])
def test_equal_gates(run, value):
    table = with_gates(run, np.full((3, 4), value), ["a"] * 4)
    for draw in (gates_figure, gates_map, alive_figure):
        assert_readable(draw(table, gate_history(table)))


def test_gates_without_threshold(run):
    table = replace(random_gates(run, 5, 9, 2), recipe={})
    for draw in (gates_figure, gates_map, alive_figure):
        assert_readable(draw(table, gate_history(table)))


def test_group_by_stage():
    names = ["net.stem.bn", "net.stage1.0.bn", "net.stage1.1.bn", "net.head"]
    assert group_by_stage(names) == {"stem": names[:1], "stage1": names[1:3], "head": names[3:]}
    assert group_by_stage(["bn"]) == {"bn": ["bn"]}
    many = [f"features.{i}.bn" for i in range(30)]
    merged = group_by_stage(many, limit=8)
    assert len(merged) == 8 and [name for held in merged.values() for name in held] == many
    assert next(iter(merged)) == "0 … 3"


def test_any_number_of_stages_is_readable(run):
    for stages in (1, 7, 8, 30):
        table = random_gates(run, 4, 3, stages)
        for draw in (gates_figure, gates_map, alive_figure):
            assert_readable(draw(table, gate_history(table)))
