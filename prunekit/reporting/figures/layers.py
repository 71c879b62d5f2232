"""Layer by layer: the channels that are kept, and what the layers cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunekit.reporting.figures.style import (
    COLOURS,
    DENSE,
    HATCHES,
    SLIM,
    WIDEST,
    Drawing,
    layer_axis,
    layer_width,
    new_figure,
    number_axis,
    styled,
)
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import size_text

WRITTEN = 60  # layers; beyond it shares are drawn, not written


def layer_drawings(run: Run) -> Iterator[Drawing]:
    """The drawings of the layers of a run; none where it has no layers yet."""
    if not len(run.layers):
        return
    branched = run.layers["branch"].nunique() > 1
    split = " Below, the learned split: the share of each branch in percent; a dash marks where the dense model splits."
    yield Drawing(
        "channels",
        "Channels kept",
        "Channels of each layer after slimming, stacked by branch; the outline is the dense model."
        + (split if branched else ""),
        channels_figure(run),
    )
    yield Drawing(
        "params_macs",
        "Parameters and MACs by layer",
        "Each layer before and after slimming; one multiply-add counts as one MAC.",
        params_macs_figure(run),
    )


def channels_figure(run: Run) -> Figure:
    """Channels kept in each layer, stacked by branch, with the dense count as an outline behind; where there are
    several branches, the share of each below."""
    kept, dense = _by_layer(run.layers, "channels_after"), _by_layer(run.layers, "channels_before")
    branched = len(kept.columns) > 1
    with styled():
        figure = new_figure(layer_width(len(kept)), 6.4 if branched else 4.4, run.name)
        if branched:
            axes, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        else:
            axes = lower = figure.add_subplot()
        places = np.arange(len(kept))
        axes.bar(
            places, dense.sum(axis=1), width=0.86, facecolor="white", edgecolor="0.25", linewidth=0.9, label="dense"
        )
        _stacked(axes, kept, labelled=True)
        axes.set_ylabel("channels")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        before, after = int(dense.to_numpy().sum()), int(kept.to_numpy().sum())
        axes.set_title(f"{after:,} of {before:,} channels kept" + (f" ({after / before:.1%})" if before else ""))
        layer_axis(axes, kept.index, named=not branched)
        if branched:
            _splits(lower, kept, dense)
            layer_axis(lower, kept.index, named=True)
        figure.legend(loc="outside lower center", ncols=min(4, len(kept.columns) + 1), frameon=False)
    return figure


def _stacked(axes: Axes, heights: pd.DataFrame, labelled: bool) -> None:
    below = np.zeros(len(heights))
    for index, branch in enumerate(heights.columns):
        colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
        label = f"branch {branch}" + (" (finest)" if index == 0 and len(heights.columns) > 1 else "")
        values = heights[branch].to_numpy()
        axes.bar(
            np.arange(len(heights)), values, width=0.7, bottom=below, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0, label=label if labelled else None,
        )  # fmt: skip
        below += values


def _splits(axes: Axes, kept: pd.DataFrame, dense: pd.DataFrame) -> None:
    """The share of each branch of the layers that have several, and where the dense ones split."""
    several = (dense > 0).sum(axis=1).to_numpy() > 1
    shares, old = _shares(kept), _shares(dense)
    shares = shares.mul(several, axis=0)
    _stacked(axes, shares, labelled=False)
    for bound in old.cumsum(axis=1).to_numpy().T[:-1]:
        at = np.flatnonzero(several & (bound < 1 - 1e-9))
        axes.hlines(bound[at], at - 0.45, at + 0.45, color="black", linewidth=1.6)
    axes.set_ylabel("share of branch (%)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    # Room for what is written on top.
    axes.set_ylim(0, 1.28)
    axes.set_yticks([0, 0.5, 1])
    if len(kept) > WRITTEN:
        return
    size = min(7.0, (min(layer_width(len(kept)), WIDEST) - 1.2) / len(kept) * 72 * 0.42)
    for place in np.flatnonzero(several):
        axes.text(
            place, 1.04, f"{100 * shares.iloc[place, 0]:.0f}", fontsize=size, ha="center", va="bottom", color=COLOURS[0]
        )


def _shares(counts: pd.DataFrame) -> pd.DataFrame:
    totals = counts.sum(axis=1)
    return counts.div(totals.where(totals > 0), axis=0).fillna(0)


def params_macs_figure(run: Run) -> Figure:
    """Parameters and MACs of each layer before and after slimming, one above the other; the totals in the titles."""
    quantities = {"params": "parameters", "macs": f"MACs {size_text(run.layers_size or run.size)}"}
    layers = [str(name) for name in dict.fromkeys(run.layers["layer"])]
    with styled():
        figure = new_figure(layer_width(len(layers)), 6.6, run.name)
        upper, lower = figure.subplots(2, 1, sharex=True)
        places = np.arange(len(layers))
        for axes, (quantity, title) in zip((upper, lower), quantities.items(), strict=True):
            totals = {}
            for shift, (when, colour, hatch) in zip(
                (-0.21, 0.21), (("before", DENSE, ""), ("after", SLIM, "///")), strict=True
            ):
                values = _by_layer(run.layers, f"{quantity}_{when}").sum(axis=1)
                totals[when] = int(values.sum())
                axes.bar(
                    places + shift, values, width=0.42, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
                    label=when if axes is upper else None,
                )  # fmt: skip
            share = f" ({totals['after'] / totals['before']:.1%})" if totals["before"] else ""
            axes.set_title(f"{title} {totals['before']:,} → {totals['after']:,}{share}")
            axes.set_ylabel(title)
            number_axis(axes)
            layer_axis(axes, layers, named=axes is lower)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _by_layer(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Layers, in the order of the network, by branches; an unknown count is 0, as nothing can be drawn for it."""
    values = layers.assign(**{column: layers[column].astype("Float64").fillna(0).astype(float)})
    table = values.pivot_table(index="layer", columns="branch", values=column, aggfunc="sum", sort=False, fill_value=0)
    return table.reindex(sorted(table.columns), axis=1)
