"""Plots: what is drawn, that nothing is cut off, and that the bytes are the same each time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prunekit.reporting import load_run
from prunekit.reporting.plots import channels_figure, params_macs_figure, totals_figure, write_figure


@pytest.fixture
def run(make_run):
    return load_run(make_run(units=("block",)))


def heights(container):
    return [bar.get_height() for bar in container]


def test_channels_are_stacked_within_the_outline(run):
    axes = channels_figure(run).axes[0]
    dense, *branches = axes.containers
    layers = list(dict.fromkeys(run.layers["layer"]))
    assert [t.get_text() for t in axes.get_xticklabels()] == layers
    for index, branch in enumerate(branches):
        rows = run.layers[run.layers["branch"] == index].set_index("layer")["channels_after"]
        assert heights(branch) == rows[layers].tolist()
    tops = np.add(heights(branches[0]), heights(branches[1]))
    assert (tops <= heights(dense)).all()
    assert [bar.get_y() for bar in branches[1]] == heights(branches[0])
    assert axes.get_ylabel() == "channels"
    assert len({bar.get_hatch() for container in branches for bar in container}) == 2


def test_params_and_macs_have_their_totals_and_units(run):
    upper, lower = params_macs_figure(run).axes
    for axes, key in ((upper, "params"), (lower, "macs")):
        for container, when in zip(axes.containers, ("before", "after"), strict=True):
            total = run.layers[f"{key}_{when}"].sum()
            assert sum(heights(container)) == total and f"{total:,}" in axes.get_title()
    assert upper.get_ylabel() == "parameters" and lower.get_ylabel() == "MACs (64×64)"


def test_totals_leave_a_gap_for_what_is_not_there(run, make_run):
    other = load_run(make_run("part", stop="finetune"))
    upper, lower = totals_figure([run, other]).axes
    assert [len(c) for c in upper.containers] == [2, 2, 1]
    assert heights(lower.containers[0]) == [r.summary["dense"]["macs"] for r in (run, other)]


def test_a_network_without_branches_and_names_with_dollars_can_be_drawn(run, tmp_path):
    layers = run.layers[run.layers["branch"] == 0].assign(layer=lambda t: "a$b$" + t["layer"])
    single = replace(run, name="$x_$", layers=layers)
    for figure in (channels_figure(single), params_macs_figure(single), totals_figure([single, single])):
        write_figure(figure, tmp_path / "plot")


def test_unknown_counts_can_be_drawn(run, tmp_path):
    unknown = replace(run, layers=run.layers.assign(macs_before=None, params_after=None))
    write_figure(params_macs_figure(unknown), tmp_path / "plot")


def test_the_bytes_are_the_same_each_time(run, tmp_path):
    first = [p.read_bytes() for p in write_figure(channels_figure(run), tmp_path / "a")]
    assert first == [p.read_bytes() for p in write_figure(channels_figure(run), tmp_path / "b")]
    assert b"<dc:date>" not in first[1]


@pytest.mark.parametrize("layers", [1, 90])
def test_nothing_is_cut_off_at_the_edges(run, tmp_path, layers):
    rows = run.layers.iloc[:2]
    table = replace(run, name="n" * 300, layers=rows.loc[rows.index.repeat(layers)].reset_index(drop=True))
    names = [f"stage{i // 2}.a_rather_long_layer_name" for i in range(2 * layers)]
    table.layers["layer"] = names
    table.layers["branch"] = [0, 1] * layers
    figures = (channels_figure(table), params_macs_figure(table), totals_figure([table, replace(table, name="m" * 40)]))
    for index, figure in enumerate(figures):
        png, svg = write_figure(figure, tmp_path / str(index))
        assert svg.stat().st_size
        image = np.asarray(Image.open(png).convert("L"))
        edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (edges == 255).all()
