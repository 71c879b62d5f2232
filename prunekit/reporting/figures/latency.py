"""The figure of ``prunekit profile``: predicted milliseconds against the channels kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from prunekit.reporting.figures import style

LAYERS = 6  # drawn on their own


def latency_figure(shares: Sequence[float], layers: Mapping[str, Sequence[float]], setting: str) -> Figure:
    """Draw the milliseconds of the whole network, and of its slowest layers.

    Args:
        shares: of the channels of every layer, ascending.
        layers: the milliseconds of each layer at each share.
        setting: what was measured, for the title.
    """
    slowest = sorted(layers, key=lambda name: -layers[name][-1])[:LAYERS]
    total = np.sum(list(layers.values()), axis=0)
    with style.figure_style():
        figure = style.new_figure(11, 4.2)
        whole, single = figure.subplots(1, 2)
        whole.plot(shares, total, color=style.COLORS[0], label="network")
        whole.plot([0, 1], [0, total[-1]], color=style.DENSE, linestyle=":", label="in proportion to the channels")
        for index, name in enumerate(slowest):
            look = {"color": style.COLORS[index], "linestyle": style.DASHES[index]}
            label = style.escape_text(style.shorten_dotted(name or "(model)", 32))
            single.plot(shares, layers[name], label=label, **look)
        whole.set_title("all layers")
        single.set_title(f"the {len(slowest)} slowest of {len(layers)} layers")
        for axes in (whole, single):
            axes.set_xlabel("channels kept in every layer")
            axes.set_ylabel("predicted milliseconds")
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlim(0, 1)
            axes.set_ylim(bottom=0)
            style.style_axes(axes)
        whole.legend(frameon=False)
        single.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        figure.suptitle(style.escape_text(setting))
    return figure
