"""Figures by layer: bars match the counts, names are readable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.figure_checks import assert_labelled, assert_readable

from prunekit.reporting.figures import write_figure
from prunekit.reporting.figures.layers import channels_figure, params_macs_figure
from prunekit.reporting.figures.style import shorten_dotted


def heights(container):
    return [bar.get_height() for bar in container]


def bars(axes):
    return [container for container in axes.containers if len(container)]


def with_layers(run, names, branches=2):
    rows = [
        {
            "layer": name, "branch": branch, "channels_before": 40 - 7 * branch, "channels_after": (7 * place) % 25,
            "params_before": 900 * place, "params_after": 400 * place, "macs_before": 10**6 * place,
            "macs_after": 10**5 * place,
        }
        for place, name in enumerate(names) for branch in range(branches)
    ]  # fmt: skip
    return replace(run, name="n" * 300, layers=pd.DataFrame(rows))


def test_channels_are_stacked(run):
    axes, lower = channels_figure(run).axes
    dense, *branches = bars(axes)
    layers = list(dict.fromkeys(run.layers["layer"]))
    assert [t.get_text() for t in lower.get_xticklabels()] == layers
    for index, branch in enumerate(branches):
        rows = run.layers[run.layers["branch"] == index].set_index("layer")["channels_after"]
        assert heights(branch) == rows[layers].tolist()
    tops = np.add(heights(branches[0]), heights(branches[1]))
    assert (tops <= heights(dense)).all()
    assert [bar.get_y() for bar in branches[1]] == heights(branches[0])
    assert axes.get_ylabel() == "channels" and lower.get_ylabel() == "share of branch (%)"
    assert len({bar.get_hatch() for container in branches for bar in container}) == 2


def test_learned_split(run):
    _, lower = channels_figure(run).axes
    kept = run.layers.pivot(index="layer", columns="branch", values="channels_after").astype(float)
    kept = kept.loc[list(dict.fromkeys(run.layers["layer"]))]
    shares = kept.div(kept.sum(axis=1).replace(0, 1), axis=0)
    first, second = bars(lower)
    assert np.allclose(heights(first), shares[0]) and np.allclose(heights(second), shares[1])
    assert [text.get_text() for text in lower.texts] == [f"{100 * share:.0f}" for share in shares[0]]
    marks = np.concatenate([lines.get_segments() for lines in lower.collections])
    assert np.allclose(marks[:, :, 1], 0.5) and len(marks) == len(kept)


def test_layer_with_one_branch_has_no_split(run):
    layers = run.layers[(run.layers["branch"] == 0) | (run.layers["layer"] != "stage0.0.block")]
    _, lower = channels_figure(replace(run, layers=layers)).axes
    assert heights(bars(lower)[0])[0] == 0
    assert len(lower.texts) == run.layers["layer"].nunique() - 1


def test_params_and_macs_totals_and_units(run):
    upper, lower = params_macs_figure(run).axes
    for axes, key in ((upper, "params"), (lower, "macs")):
        for container, when in zip(bars(axes), ("before", "after"), strict=True):
            total = run.layers[f"{key}_{when}"].sum()
            assert sum(heights(container)) == total and f"{total:,}" in axes.get_title()
    assert upper.get_ylabel() == "parameters" and lower.get_ylabel() == "MACs (64×64)"


def test_network_without_branches_has_no_split(run):
    single = replace(run, layers=run.layers[run.layers["branch"] == 0])
    (axes,) = channels_figure(single).axes
    assert "split" not in axes.get_ylabel() and axes.get_xlabel().startswith("layer")


def test_unknown_counts(run, tmp_path):
    unknown = replace(run, layers=run.layers.assign(macs_before=None, params_after=None))
    write_figure(params_macs_figure(unknown), tmp_path / "plot")


@pytest.mark.parametrize("count", [1, 2, 60, 150])
def test_any_number_of_layers_is_readable(run, count):
    names = [f"backbone_network.stage{i // 12}.residual_block{i % 12}.depthwise_convolution" for i in range(count)]
    table = with_layers(run, names, branches=3)
    for figure in (channels_figure(table), params_macs_figure(table)):
        assert_readable(figure)
        assert_labelled(figure)
        told = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
        assert len(set(told)) == len(told)
        assert (count <= 60) == ("named" not in figure.axes[-1].get_xlabel())


def test_title_counts_channels_as_the_summary_does(run):
    kept = {"channels": 226, "of": 360}
    figure = channels_figure(replace(run, summary={**run.summary, "kept": kept}))
    assert figure.axes[0].get_title() == "226 of 360 prunable channels kept (62.8%)"
    assert channels_figure(replace(run, summary={})).axes[0].get_title() == ""


def test_common_prefix_is_in_axis_label(run):
    figure = channels_figure(with_layers(run, ["model.body.a.conv", "model.body.b.conv"]))
    lower = figure.axes[-1]
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["a.conv", "b.conv"]
    assert lower.get_xlabel().endswith("(in model.body)")


def test_shorten_dotted_keeps_all_parts():
    long = [f"stage{i}.residual_block{j}.depthwise_convolution" for i in range(4) for j in range(20)]
    short = [shorten_dotted(name, 28) for name in long]
    assert len(set(short)) == len(long) and max(map(len, short)) <= 28
    assert shorten_dotted("stage1.0.conv", 28) == "stage1.0.conv"
    assert len(shorten_dotted(".".join("abcdefgh" * 3), 10)) <= 10
