"""Plots of runs, drawn without a display and the same bytes each time.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; hatches do the same in grey print.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prunekit.files import write_atomic
from prunekit.reporting.load import PARTS, Run
from prunekit.reporting.tables import macs_title, short, size_text

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo")
DENSE, SLIM = "#B0B0B0", COLOURS[0]
DPI = 150
_STYLE = {"svg.hashsalt": "prunekit", "hatch.linewidth": 0.6, "font.size": 9, "axes.titlesize": 10}


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``<stem>.png`` (150 dpi) and ``<stem>.svg``, and return their paths.

    Raises:
        CheckpointError: the system refused.
    """
    written = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            # A date would make every report differ from the one before.
            figure.savefig(buffer, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomic(path, buffer.getvalue())
        written.append(path)
    return written


def channels_figure(run: Run) -> Figure:
    """Channels kept in each layer, stacked by branch, with the dense count as an outline behind."""
    kept = _by_layer(run.layers, "channels_after")
    dense = _by_layer(run.layers, "channels_before").sum(axis=1)
    figure = _figure(run, len(kept), 4.4)
    axes = figure.add_subplot()
    places = np.arange(len(kept))
    axes.bar(places, dense, width=0.86, facecolor="none", edgecolor="0.25", linewidth=0.9, label="dense")
    below = np.zeros(len(kept))
    for index, branch in enumerate(kept.columns):
        colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
        heights = kept[branch].to_numpy()
        axes.bar(
            places, heights, width=0.7, bottom=below, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
            label=f"branch {branch}" + (" (finest)" if index == 0 and len(kept.columns) > 1 else ""),
        )  # fmt: skip
        below += heights
    axes.set_ylabel("channels")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{int(below.sum()):,} of {int(dense.sum()):,} channels kept")
    _layer_axis(axes, kept.index, named=True)
    figure.legend(loc="outside lower center", ncols=min(4, len(kept.columns) + 1), frameon=False)
    return figure


def params_macs_figure(run: Run) -> Figure:
    """Parameters and MACs of each layer before and after slimming, one above the other; the totals in the titles."""
    quantities = {"params": "parameters", "macs": macs_title(run)}
    layers = list(dict.fromkeys(run.layers["layer"]))
    figure = _figure(run, len(layers), 6.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    places = np.arange(len(layers))
    for axes, (quantity, title) in zip((upper, lower), quantities.items(), strict=True):
        totals = {}
        for shift, (when, colour, hatch) in zip(
            (-0.2, 0.2), (("before", DENSE, ""), ("after", SLIM, "///")), strict=True
        ):
            values = _by_layer(run.layers, f"{quantity}_{when}").sum(axis=1)
            totals[when] = int(values.sum())
            axes.bar(
                places + shift, values, width=0.4, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
                label=when if axes is upper else None,
            )  # fmt: skip
        share = f" ({totals['after'] / totals['before']:.1%})" if totals["before"] else ""
        axes.set_title(f"{title} {totals['before']:,} → {totals['after']:,}{share}")
        axes.set_ylabel(title)
        _number_axis(axes)
        _layer_axis(axes, layers, named=axes is lower)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def totals_figure(runs: Sequence[Run]) -> Figure:
    """Parameters and MACs of several runs side by side, a bar for each model that is there."""
    parts = [part for part in PARTS if any(isinstance(run.summary.get(part), dict) for run in runs)]
    figure = Figure(figsize=(min(max(6.5, 1.2 + 1.7 * len(runs)), 48), 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    width = 0.8 / max(len(parts), 1)
    for axes, quantity, title in zip(panels, ("params", "macs"), ("parameters", "MACs"), strict=True):
        for index, part in enumerate(parts):
            at, heights = [], []
            for place, run in enumerate(runs):
                value = (run.summary.get(part) or {}).get(quantity)
                if value is not None:
                    at.append(place - 0.4 + (index + 0.5) * width)
                    heights.append(value)
            bars = axes.bar(
                at,
                heights,
                width=width * 0.94,
                color=COLOURS[index % len(COLOURS)],
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor="white",
                linewidth=0,
                label=part if axes is panels[0] else None,
            )
            axes.bar_label(bars, [short(height) for height in heights], fontsize=7, padding=2, rotation=90)
        axes.set_ylabel(title)
        axes.margins(y=0.28)
        _number_axis(axes)
        _quiet(axes)
    # Folded, not turned: turned names of two lines take more room than the bars.
    labels = ["\n".join([*wrap(_shorten(run.name, 48), 16), size_text(run.size)]).replace("$", r"\$") for run in runs]
    panels[1].set_xticks(range(len(runs)), labels)
    panels[1].set_xlim(-0.6, len(runs) - 0.4)
    panels[1].set_xlabel("run (size of the image that its MACs are counted on)")
    panels[0].set_title("Totals by run and model")
    if parts:
        figure.legend(loc="outside lower center", ncols=len(parts), frameon=False)
    return figure


def _by_layer(layers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Layers, in the order of the network, by branches; an unknown count is 0, as nothing can be drawn for it."""
    values = layers.assign(**{column: layers[column].astype("Float64").fillna(0).astype(float)})
    table = values.pivot_table(index="layer", columns="branch", values=column, aggfunc="sum", sort=False, fill_value=0)
    return table.reindex(sorted(table.columns), axis=1)


def _figure(run: Run, layers: int, height: float) -> Figure:
    figure = Figure(figsize=(min(max(6.5, 1.6 + 0.24 * layers), 48), height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(_shorten(run.name, 48)), fontsize=11)
    return figure


def _layer_axis(axes: Axes, names: Sequence[str], named: bool) -> None:
    size = 8 if len(names) <= 60 else 6.5
    axes.set_xticks(range(len(names)), [_plain(str(name)) for name in names], rotation=90, fontsize=size)
    axes.set_xlim(-0.7, len(names) - 0.3)
    if named:
        axes.set_xlabel("layer, from the input to the output")
    _quiet(axes)


def _number_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_ylim(bottom=0)


def _quiet(axes: Axes) -> None:
    axes.grid(axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _shorten(text: str, length: int) -> str:
    """The beginning and the end, which tell names apart."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"


def _plain(text: str) -> str:
    """Without this a dollar in a name starts a formula."""
    return text.replace("$", r"\$")
