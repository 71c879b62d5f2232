"""A training, epoch by epoch: losses, λ and budget; the course of the gates; the channels that live."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from prunekit.reporting.figures.run_data import gates, metric_title, stages_of, threshold
from prunekit.reporting.figures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    Drawing,
    count_axis,
    new_figure,
    plain,
    quiet,
    shorten,
    styled,
)
from prunekit.reporting.loader import Run

STAGES = {"train": "sparse training", "finetune": "fine-tuning", "baseline": "baseline"}
DRAWN = 48  # courses in one panel: beyond it the ink runs together
RASTERIZED = 1000  # points in one panel: beyond it an SVG of lines is larger than one of pixels
ALIVE, DEAD = COLOURS[0], COLOURS[1]


def training_drawings(run: Run) -> Iterator[Drawing]:
    """The drawings of the training of a run, which may be going on; none where no epoch is done."""
    if _rows(run.metrics):
        yield Drawing(
            "training",
            "Loss, penalty and λ",
            "Means over each epoch, for sparse training and for fine-tuning; λ is the weight of the decay.",
            training_figure(run),
        )
    courses = gates(run)
    if courses:
        yield Drawing(
            "gates",
            "Gates over training",
            "The course of effective gates |γ|·√(v/(v+ε)) over sparse training, by stage of the network. Of a stage "
            f"with many gates {DRAWN} are drawn, evenly from its largest to its smallest; the median is that of all. "
            "Values below the axis are drawn at its lower end.",
            gates_figure(run, courses),
        )
        yield Drawing(
            "gates_map",
            "Every gate over training",
            "Every effective gate, a row each, by stage of the network and within a stage by its last value. Blue is "
            "above the threshold, orange below it; the paler, the closer to zero.",
            gates_map(run, courses),
        )
        yield Drawing(
            "alive",
            "Gates alive by stage",
            "The share of the gates of each stage of the network that are above the threshold after each epoch of "
            "sparse training; the thick line is the share of all channels that live.",
            alive_figure(run, courses),
        )


# ---- loss, penalty, λ


def training_figure(run: Run) -> Figure:
    """Loss, penalty, λ, metrics and, where there is a budget, the size, over the epochs of each stage."""
    table = run.metrics
    stages = list(dict.fromkeys(table["stage"]))
    rows = _rows(table)
    with styled():
        heights = [0.8 if title.startswith("λ") else 1.5 for title in rows]
        figure = new_figure(max(6.5, 1.0 + 3.2 * len(stages)), 1.2 + sum(heights), run.name)
        panels = figure.subplots(
            len(rows), len(stages), sharex="col", sharey="row", squeeze=False, height_ratios=heights
        )
        for line, (title, columns) in zip(panels, rows.items(), strict=True):
            _scale(line[0], table, columns, title)
            for axes, stage in zip(line, stages, strict=True):
                _course(axes, table[table["stage"] == stage], columns, title)
            line[0].set_ylabel(title)
        for axes, stage in zip(panels[0], stages, strict=True):
            axes.set_title(STAGES.get(stage, plain(shorten(str(stage), 32))))
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        figure.align_ylabels(panels[:, 0])
    return figure


def _rows(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Title of the y axis → column → what its line is called; only what has a number."""
    if "stage" not in table or "epoch" not in table or not len(table):
        return {}
    metrics = {c: metric_title(c.removeprefix("metrics.")) for c in table.columns if c.startswith("metrics.")}
    wanted: dict[str, dict[str, str]] = {
        "loss": {"loss": "loss"},
        "penalty (with λ)": {"penalty": "penalty"},
        "λ (weight)": {"lambda": "λ"},
        next(iter(metrics.values())) if len(metrics) == 1 else "metrics (validation)": metrics,
    }
    for measure, unit in (("params", "parameters"), ("macs", "MACs")):
        wanted[unit] = {f"size.{measure}": "if cut now", f"budget.{measure}": "budget"}
    return {
        title: there
        for title, columns in wanted.items()
        if (there := {c: plain(shorten(name, 32)) for c, name in columns.items() if _numbers(table, c).notna().any()})
    }


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    if column not in table:
        return pd.Series(np.nan, index=table.index)
    values = pd.to_numeric(table[column], errors="coerce").astype(float)
    return values.where(np.isfinite(values))


def _scale(axes: Axes, table: pd.DataFrame, columns: dict[str, str], title: str) -> None:
    """A logarithmic axis where numbers span decades; counts in short form."""
    values = pd.concat([_numbers(table, column) for column in columns])
    positive = values[values > 0]
    if title.startswith(("loss", "penalty", "λ")) and len(positive) and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif title in ("parameters", "MACs"):
        count_axis(axes.yaxis)
        axes.set_ylim(0, 1.08 * values.max())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3 if title.startswith("λ") else 5))
        axes.margins(y=0.08)


def _course(axes: Axes, table: pd.DataFrame, columns: dict[str, str], title: str) -> None:
    epochs = _numbers(table, "epoch")
    few = len(epochs) <= 30
    drawn = False
    for index, (column, label) in enumerate(columns.items()):
        values = _numbers(table, column)
        if axes.get_yscale() == "log" or (title.startswith(("penalty", "λ")) and not values.any()):
            values = values.where(values > 0)
        if not values.notna().any():
            continue
        drawn = True
        colour = COLOURS[index % len(COLOURS)] if not column.startswith("budget") else "black"
        axes.plot(
            epochs, values, color=colour, linestyle=DASHES[index % len(DASHES)], linewidth=1.3,
            marker=MARKERS[index % len(MARKERS)] if few and not column.startswith("budget") else None, markersize=3,
            label=label,
        )  # fmt: skip
    quiet(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    if not drawn:
        axes.text(
            0.5, 0.5, "no decay" if title[0] in "pλ" else "none", transform=axes.transAxes, ha="center", color="0.35"
        )
    elif len(columns) > 1:
        axes.legend(frameon=False, fontsize=7.5, handlelength=2.4)


# ---- gates


def gates_figure(run: Run, courses: dict[str, np.ndarray]) -> Figure:
    """The course of each gate on a logarithmic axis, a panel for each stage of the network.

    Args:
        courses: norm → effective gates, (epochs, channels); stages are in the order of their first norms.
    """
    stages = stages_of(list(courses))
    limit = threshold(run)
    stacked = {stage: np.concatenate([courses[norm] for norm in norms], axis=1) for stage, norms in stages.items()}
    low, high = _range(np.concatenate(list(stacked.values()), axis=1), limit)
    with styled():
        columns = min(len(stages), 4 if len(stages) > 6 else 3 if len(stages) > 4 else 2)
        lines = -(-len(stages) // columns)
        figure = new_figure(max(6.5, 0.9 + 2.3 * columns), 1.3 + 1.9 * lines, run.name)
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (stage, values) in zip(panels, stacked.items(), strict=False):
            _panel(axes, np.maximum(values, low), limit)
            axes.set_title(f"{plain(shorten(stage, 28))} ({values.shape[1]:,})", fontsize=9)
        for axes in panels[len(stages) :]:
            axes.remove()
        axes = panels[0]
        axes.set_yscale("log")
        axes.set_ylim(low * 0.8, high * 1.25)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5))
        for axes in panels[max(0, len(stages) - columns) : len(stages)]:
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel("epoch of sparse training")
        figure.supylabel("effective gate (output deviation)", fontsize=9)
        figure.legend(handles=_gate_keys(limit), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _range(values: np.ndarray, limit: float | None) -> tuple[float, float]:
    """What is worth to be seen: gates on their way to zero go through 30 decades, of which three below the threshold
    tell enough."""
    positive = values[values > 0]
    high = float(positive.max()) if positive.size else 1.0
    least = float(positive.min()) if positive.size else 1e-4
    if limit:
        return max(min(least, limit / 10), limit / 1e3), max(high, limit * 10)
    return max(min(least, high / 10), high / 1e5), high


def _panel(axes: Axes, values: np.ndarray, limit: float | None) -> None:
    epochs = np.arange(1, len(values) + 1)
    # A line needs no more points than the panel has pixels.
    shown = np.unique(np.linspace(0, len(values) - 1, min(len(values), 120)).astype(int))
    ranks = np.argsort(values[-1], kind="stable")
    drawn = ranks[np.unique(np.linspace(0, len(ranks) - 1, min(len(ranks), DRAWN)).astype(int))]
    courses = values[shown][:, drawn]
    ends_alive = courses[-1] > limit if limit is not None else np.ones(len(drawn), bool)
    colours = [ALIVE if alive else DEAD for alive in ends_alive]
    if len(values) == 1:
        axes.scatter(np.ones(len(drawn)), courses[0], s=10, marker="_", linewidths=0.8, color=colours)
    else:
        points = np.stack([np.broadcast_to(epochs[shown, None], courses.shape), courses], axis=-1).transpose(1, 0, 2)
        dense = points.shape[0] * points.shape[1] > RASTERIZED
        axes.add_collection(LineCollection(points, colors=colours, linewidths=0.6, rasterized=dense), autolim=False)
    axes.plot(epochs[shown], np.median(values, axis=1)[shown], color="black", linewidth=1.5)
    if limit is not None:
        axes.axhline(limit, color="black", linewidth=0.9, linestyle="--")
    pad = 0.02 * max(len(values) - 1, 1)
    axes.set_xlim(1 - pad, len(values) + pad)
    quiet(axes)


def _gate_keys(limit: float | None) -> list[Line2D]:
    median = Line2D([], [], color="black", linewidth=1.5, label="median")
    if limit is None:
        return [Line2D([], [], color=ALIVE, label="gate"), median]
    return [
        Line2D([], [], color=ALIVE, label="ends above"),
        Line2D([], [], color=DEAD, label="ends below"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.9, label=f"threshold {limit:g}"),
        median,
    ]


def gates_map(run: Run, courses: dict[str, np.ndarray]) -> Figure:
    """Every gate as a row of colour over the epochs; ``courses`` as for :func:`gates_figure`."""
    stages = stages_of(list(courses))
    stacked = [np.concatenate([courses[norm] for norm in norms], axis=1).T for norms in stages.values()]
    rows = np.concatenate([values[np.argsort(-values[:, -1], kind="stable")] for values in stacked])
    limit = threshold(run)
    low, high = np.log10(_range(rows, limit))
    with styled():
        figure = new_figure(6.5, 6.0, run.name)
        axes = figure.add_subplot()
        image = axes.imshow(
            _shrunk(np.log10(np.clip(rows, 10**low, 10**high)), 700, 400), aspect="auto", interpolation="nearest",
            extent=(0.5, rows.shape[1] + 0.5, len(rows), 0), vmin=low, vmax=high,
            cmap=_inks((np.log10(limit) - low) / (high - low) if limit else 0.0),
        )  # fmt: skip
        bounds = np.cumsum([0, *map(len, stacked)])
        for bound in bounds[1:-1]:
            axes.axhline(bound, color="black", linewidth=0.8)
        _stage_axis(axes, list(stages), bounds)
        axes.set_xlabel("epoch of sparse training")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(f"{len(rows):,} gates")
        bar = figure.colorbar(image, ax=axes, shrink=0.6)
        bar.set_label("effective gate (output deviation)")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:g}}}$"))
    return figure


def _inks(limit: float) -> LinearSegmentedColormap:
    """From white to orange up to the threshold (0 to 1 on the scale), from blue to navy beyond it: darker is more, in
    grey print too."""
    limit = float(np.clip(limit, 0, 1))
    inks = [(0.0, "#FFFFFF"), (limit, "#E9A93A"), (limit, "#5AA5DC"), (1.0, "#06264D")]
    return LinearSegmentedColormap.from_list("gates", inks if 0 < limit < 1 else [inks[2][1], inks[3][1]], N=512)


def _shrunk(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means over neighbours, for no more pixels than can be seen."""
    for axis, most in ((0, rows), (1, columns)):
        if values.shape[axis] > most:
            starts = np.unique(np.linspace(0, values.shape[axis], most, endpoint=False).astype(int))
            counts = np.diff([*starts, values.shape[axis]])
            sums = np.add.reduceat(values, starts, axis=axis)
            values = sums / (counts[:, None] if axis == 0 else counts)
    return values


def _stage_axis(axes: Axes, names: list[str], bounds: np.ndarray) -> None:
    """Each stage named in its middle, as far as they do not stand too close."""
    middles, told, last = (bounds[:-1] + bounds[1:]) / 2, [], -np.inf
    for middle, name in zip(middles, names, strict=True):
        if middle - last >= bounds[-1] / 30:
            told.append((middle, plain(shorten(name, 24))))
            last = middle
    axes.set_yticks([middle for middle, _ in told], [name for _, name in told])
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("gates, by stage of the network")


def alive_figure(run: Run, courses: dict[str, np.ndarray]) -> Figure:
    """The share of gates above the threshold after each epoch, a line for each stage of the network."""
    limit = threshold(run) or 0.0
    stages = stages_of(list(courses), most=len(COLOURS))
    with styled():
        figure = new_figure(7.5, 4.2, run.name)
        axes = figure.add_subplot()
        length = len(next(iter(courses.values())))
        epochs = np.arange(1, length + 1)
        for index, (stage, norms) in enumerate(stages.items()):
            values = np.concatenate([courses[norm] for norm in norms], axis=1)
            axes.plot(
                epochs, 100 * (values > limit).mean(axis=1), color=COLOURS[index], linestyle=DASHES[index],
                linewidth=1.5, marker=MARKERS[index], markersize=4, markevery=max(1, length // 12),
                label=f"{plain(shorten(stage, 28))} ({values.shape[1]:,} gates)",
            )  # fmt: skip
        total = _channels(run)
        if len(total):
            axes.plot(total.index, total, color="black", linewidth=2.4, alpha=0.75, zorder=1.5, label="all channels")
            if len(total) == 1:
                axes.plot(total.index, total, "k_", markersize=12)
        axes.set_xlabel("epoch of sparse training")
        axes.set_ylabel("alive (%)")
        axes.set_ylim(0, 104)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(f"gates above the threshold {limit:g}")
        quiet(axes)
        figure.legend(loc="outside right center", frameon=False, fontsize=8, handlelength=3)
    return figure


def _channels(run: Run) -> pd.Series:
    """Epoch → living channels in percent of all."""
    table = run.metrics
    if not {"stage", "epoch", "alive", "of"} <= set(table.columns):
        return pd.Series(dtype=float)
    table = table[table["stage"] == "train"]
    of = _numbers(table, "of")
    share = 100 * _numbers(table, "alive") / of.where(of > 0)
    return pd.Series(share.to_numpy(), index=_numbers(table, "epoch").to_numpy()).dropna()
