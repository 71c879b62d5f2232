"""Figures by layer: kept channels, parameters and MACs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunekit.reporting.figures import style
from prunekit.reporting.figures.style import ReportFigure, points
from prunekit.reporting.loader import Run
from prunekit.reporting.number_format import format_size

MAX_WRITTEN = 60  # layers; with more, shares are drawn without numbers


def layer_figures(run: Run) -> Iterator[ReportFigure]:
    """Yield the figures of the layers of a run; none before slimming."""
    if not len(run.layers):
        return
    split = " Below, the learned split: the share of each branch in percent; dashes mark the split of the dense model."
    yield ReportFigure(
        "channels",
        "Channels kept",
        "Channels of each layer after slimming, stacked by branch; the outline is the dense model."
        + (split if run.layers["branch"].nunique() > 1 else ""),
        channels_figure(run),
    )
    yield ReportFigure(
        "params_macs",
        "Parameters and MACs by layer",
        "Each layer before and after slimming; one multiply-add counts as one MAC.",
        params_macs_figure(run),
    )


def channels_figure(run: Run) -> Figure:
    """Draw the kept channels of each layer, stacked by branch, and with several branches their shares below."""
    kept, dense = _by_layer(run.layers, "channels_after"), _by_layer(run.layers, "channels_before")
    branched = len(kept.columns) > 1
    with style.figure_style():
        figure = style.new_figure(style.layers_width(len(kept)), 6.1 if branched else 4.1)
        if branched:
            axes, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        else:
            axes = lower = figure.add_subplot()
        outline = {"facecolor": "white", "edgecolor": "0.25", "linewidth": 0.9}
        axes.bar(np.arange(len(kept)), dense.sum(axis=1), width=0.86, label="dense", **outline)
        _stacked_bars(axes, kept, labeled=True)
        axes.set_ylabel("channels")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        # As in the terminal and in the summary: each channel once, and only those that could be removed.
        after, before = (run.summary.get("kept", {}).get(key) for key in ("channels", "of"))
        if before and after is not None:
            axes.set_title(f"{after:,} of {before:,} prunable channels kept ({after / before:.1%})")
        style.style_layers_axis(axes, kept.index, labeled=not branched)
        if branched:
            _draw_splits(lower, kept, dense)
            style.style_layers_axis(lower, kept.index, labeled=True)
        columns = min(2 if style.is_narrow(figure) else 4, len(kept.columns) + 1)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _stacked_bars(axes: Axes, heights: pd.DataFrame, labeled: bool) -> None:
    bottom = np.zeros(len(heights))
    for index, branch in enumerate(heights.columns):
        label = f"branch {branch}" + (" (finest)" if index == 0 else "") if len(heights.columns) > 1 else "slim"
        values = heights[branch].to_numpy()
        bars = {"bottom": bottom, "label": label if labeled else None, **style.bar_style(index)}
        axes.bar(np.arange(len(heights)), values, width=0.7, **bars)
        bottom += values


def _draw_splits(axes: Axes, kept: pd.DataFrame, dense: pd.DataFrame) -> None:
    """Draw the share of each branch in layers with several branches, and the split of the dense model."""
    is_split = (dense > 0).sum(axis=1).to_numpy() > 1
    shares = _shares(kept).mul(is_split, axis=0)
    _stacked_bars(axes, shares, labeled=False)
    for bound in _shares(dense).cumsum(axis=1).to_numpy().T[:-1]:
        x = np.flatnonzero(is_split & (bound < 1 - 1e-9))
        axes.hlines(bound[x], x - 0.45, x + 0.45, color="black", linewidth=1.6)
    axes.set_ylabel("share of branch (%)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_ylim(0, 1.28)  # with room for the numbers
    axes.set_yticks([0, 0.5, 1])
    if len(kept) > MAX_WRITTEN:
        return
    size = min(points(7), (axes.figure.get_figwidth() - 1.2) / len(kept) * 72 * 0.42)
    for x in np.flatnonzero(is_split):
        text = f"{100 * shares.iloc[x, 0]:.0f}"
        axes.text(x, 1.04, text, fontsize=size, ha="center", va="bottom", color=style.COLORS[0])


def _shares(counts: pd.DataFrame) -> pd.DataFrame:
    totals = counts.sum(axis=1)
    return counts.div(totals.where(totals > 0), axis=0).fillna(0)


def params_macs_figure(run: Run) -> Figure:
    """Draw the parameters and the MACs of each layer before and after slimming; the totals are in the titles."""
    quantities = {"params": "parameters", "macs": f"MACs {format_size(run.layers_size or run.size)}"}
    layers = [str(name) for name in dict.fromkeys(run.layers["layer"])]
    bars = {"before": {"color": style.DENSE, "hatch": ""}, "after": {"color": style.SLIM, "hatch": "///"}}
    with style.figure_style():
        figure = style.new_figure(style.layers_width(len(layers)), 6.3)
        panels = figure.subplots(2, 1, sharex=True)
        for axes, (quantity, title) in zip(panels, quantities.items(), strict=True):
            totals = {}
            for shift, (when, look) in zip((-0.21, 0.21), bars.items(), strict=True):
                values = _by_layer(run.layers, f"{quantity}_{when}").sum(axis=1)
                totals[when] = int(values.sum())
                label = when if axes is panels[0] else None
                axes.bar(
                    np.arange(len(layers)) + shift, values, 0.42, edgecolor="white", linewidth=0, label=label, **look
                )
            share = f" ({totals['after'] / totals['before']:.1%})" if totals["before"] else ""
            axes.set_title(f"{title} {totals['before']:,} → {totals['after']:,}{share}")
            axes.set_ylabel(title)
            style.format_counts(axes.yaxis)
            axes.set_ylim(bottom=0)
            style.style_layers_axis(axes, layers, labeled=axes is panels[1])
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _by_layer(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a table of layers, in network order, by branches; unknown counts are 0."""
    values = layers.assign(**{column: layers[column].astype("Float64").fillna(0).astype(float)})
    table = values.pivot_table(index="layer", columns="branch", values=column, aggfunc="sum", sort=False, fill_value=0)
    return table.reindex(sorted(table.columns), axis=1)
