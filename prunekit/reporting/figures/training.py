"""Figures of training: losses, λ, metrics and budget by epoch, and the history of the gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from prunekit.reporting.figures.run_data import gate_history, gate_threshold, group_by_stage, metric_title
from prunekit.reporting.figures.style import (
    COLOURS,
    DASHES,
    MARKERS,
    ReportFigure,
    escape_text,
    figure_style,
    format_counts,
    new_figure,
    shorten,
    style_axes,
)
from prunekit.reporting.loader import Run

STAGE_TITLES = {"train": "sparse training", "finetune": "fine-tuning", "baseline": "baseline"}
MAX_LINES = 48  # in one panel; more cannot be distinguished
MAX_VECTOR_POINTS = 1000  # in one panel; beyond it, a rasterized SVG is smaller
ALIVE, DEAD = COLOURS[0], COLOURS[1]


def training_figures(run: Run) -> Iterator[ReportFigure]:
    """Yield the figures of the training of a run, complete or not; none before the first epoch."""
    if _training_rows(run.metrics):
        yield ReportFigure(
            "training",
            "Loss, penalty and λ",
            "Means over each epoch, for sparse training and for fine-tuning; λ is the weight of the decay.",
            training_figure(run),
        )
    history = gate_history(run)
    if history:
        yield ReportFigure(
            "gates",
            "Gates during training",
            "Effective gates |γ|·√(v/(v+ε)) during sparse training, by stage of the network. Of a stage with many "
            f"gates, {MAX_LINES} are drawn, at equal distances from the largest to the smallest; the median is that of "
            "all. Values below the axis are drawn at its lower end.",
            gates_figure(run, history),
        )
        yield ReportFigure(
            "gates_map",
            "All gates during training",
            "All effective gates, a row each, by stage of the network and within a stage by the last value. Blue is "
            "above the threshold, orange below; paler is closer to zero.",
            gates_map(run, history),
        )
        yield ReportFigure(
            "alive",
            "Gates above the threshold",
            "The share of the gates of each stage of the network that are above the threshold after each epoch of "
            "sparse training; the thick line is the share of all channels.",
            alive_figure(run, history),
        )


# ---- loss, penalty, λ


def training_figure(run: Run) -> Figure:
    """Plot loss, penalty, λ, metrics and, with a budget, the size, over the epochs of each stage."""
    table = run.metrics
    stages = list(dict.fromkeys(table["stage"]))
    rows = _training_rows(table)
    with figure_style():
        heights = [0.8 if title.startswith("λ") else 1.5 for title in rows]
        figure = new_figure(max(6.5, 1.0 + 3.2 * len(stages)), 1.2 + sum(heights), run.name)
        grid = {"sharex": "col", "sharey": "row", "squeeze": False, "height_ratios": heights}
        panels = figure.subplots(len(rows), len(stages), **grid)
        for row, (title, columns) in zip(panels, rows.items(), strict=True):
            _style_value_axis(row[0], table, columns, title)
            for axes, stage in zip(row, stages, strict=True):
                _plot_epochs(axes, table[table["stage"] == stage], columns, title)
            row[0].set_ylabel(title)
        for axes, stage in zip(panels[0], stages, strict=True):
            axes.set_title(STAGE_TITLES.get(stage, escape_text(shorten(str(stage), 32))))
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        figure.align_ylabels(panels[:, 0])
    return figure


def _training_rows(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Return title of the y axis → column → label of its line, for columns with numbers."""
    if "stage" not in table or "epoch" not in table or not len(table):
        return {}
    metrics = {c: metric_title(c.removeprefix("metrics.")) for c in table.columns if c.startswith("metrics.")}
    rows: dict[str, dict[str, str]] = {
        "loss": {"loss": "loss"},
        "penalty (with λ)": {"penalty": "penalty"},
        "λ (weight)": {"lambda": "λ"},
        next(iter(metrics.values())) if len(metrics) == 1 else "metrics (validation)": metrics,
        "parameters": {"size.params": "if pruned now", "budget.params": "budget"},
        "MACs": {"size.macs": "if pruned now", "budget.macs": "budget"},
    }
    return {
        title: known
        for title, columns in rows.items()
        if (known := {c: escape_text(shorten(n, 32)) for c, n in columns.items() if _numbers(table, c).notna().any()})
    }


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    if column not in table:
        return pd.Series(np.nan, index=table.index)
    values = pd.to_numeric(table[column], errors="coerce").astype(float)
    return values.where(np.isfinite(values))


def _style_value_axis(axes: Axes, table: pd.DataFrame, columns: Mapping[str, str], title: str) -> None:
    """Use a logarithmic axis for numbers that span decades, and short counts."""
    values = pd.concat([_numbers(table, column) for column in columns])
    positive = values[values > 0]
    if title.startswith(("loss", "penalty", "λ")) and len(positive) and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif title in ("parameters", "MACs"):
        format_counts(axes.yaxis)
        axes.set_ylim(0, 1.08 * values.max())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3 if title.startswith("λ") else 5))
        axes.margins(y=0.08)


def _plot_epochs(axes: Axes, table: pd.DataFrame, columns: Mapping[str, str], title: str) -> None:
    epochs = _numbers(table, "epoch")
    empty = True
    for index, (column, label) in enumerate(columns.items()):
        values = _numbers(table, column)
        if axes.get_yscale() == "log" or (title.startswith(("penalty", "λ")) and not values.any()):
            values = values.where(values > 0)
        if not values.notna().any():
            continue
        empty, is_budget = False, column.startswith("budget")
        axes.plot(
            epochs, values, color="black" if is_budget else COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)], linewidth=1.3, markersize=3, label=label,
            marker=None if is_budget or len(epochs) > 30 else MARKERS[index % len(MARKERS)],
        )  # fmt: skip
    style_axes(axes)
    _style_epoch_axis(axes, nbins=6)
    if empty:
        text = "no decay" if title[0] in "pλ" else "none"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.35")
    elif len(columns) > 1:
        axes.legend(frameon=False, fontsize=7.5, handlelength=2.4)


def _style_epoch_axis(axes: Axes, label: str = "", **options: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, **options))
    if label:
        axes.set_xlabel(label)


# ---- gates


def _stack_by_stage(history: Mapping[str, np.ndarray], **options: int) -> dict[str, np.ndarray]:
    """Join norm → gates, [epochs, channels], to stage → gates, in the order of the first norms."""
    stages = group_by_stage(list(history), **options)
    return {stage: np.concatenate([history[norm] for norm in norms], axis=1) for stage, norms in stages.items()}


def gates_figure(run: Run, history: Mapping[str, np.ndarray]) -> Figure:
    """Plot each gate on a logarithmic axis, a panel for each stage of the network.

    Args:
        run: the run.
        history: norm → effective gates, [epochs, channels].
    """
    threshold = gate_threshold(run)
    stages = _stack_by_stage(history)
    low, high = _value_range(np.concatenate(list(stages.values()), axis=1), threshold)
    with figure_style():
        columns = min(len(stages), 4 if len(stages) > 6 else 3 if len(stages) > 4 else 2)
        rows = -(-len(stages) // columns)
        figure = new_figure(max(6.5, 0.9 + 2.3 * columns), 1.3 + 1.9 * rows, run.name)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (stage, values) in zip(panels, stages.items(), strict=False):
            _plot_gates(axes, np.maximum(values, low), threshold)
            axes.set_title(f"{escape_text(shorten(stage, 28))} ({values.shape[1]:,})", fontsize=9)
        for axes in panels[len(stages) :]:
            axes.remove()
        axes = panels[0]
        axes.set_yscale("log")
        axes.set_ylim(low * 0.8, high * 1.25)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        _style_epoch_axis(axes, nbins=5)
        for axes in panels[max(0, len(stages) - columns) : len(stages)]:
            axes.tick_params(axis="x", labelbottom=True)
            axes.set_xlabel("epoch of sparse training")
        figure.supylabel("effective gate (output deviation)", fontsize=9)
        figure.legend(handles=_gate_legend(threshold), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _value_range(values: np.ndarray, threshold: float | None) -> tuple[float, float]:
    """Return the range to draw: of the 30 decades of gates that go to zero, three below the threshold."""
    positive = values[values > 0]
    high = float(positive.max()) if positive.size else 1.0
    smallest = float(positive.min()) if positive.size else 1e-4
    if threshold:
        return max(min(smallest, threshold / 10), threshold / 1e3), max(high, threshold * 10)
    return max(min(smallest, high / 10), high / 1e5), high


def _plot_gates(axes: Axes, values: np.ndarray, threshold: float | None) -> None:
    # A line needs no more points than the panel has pixels.
    shown = np.unique(np.linspace(0, len(values) - 1, min(len(values), 120)).astype(int))
    epochs = 1 + shown
    order = np.argsort(values[-1], kind="stable")
    drawn = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), MAX_LINES)).astype(int))]
    lines = values[shown][:, drawn]
    is_alive = lines[-1] > threshold if threshold is not None else np.ones(len(drawn), bool)
    colours = [ALIVE if alive else DEAD for alive in is_alive]
    if len(values) == 1:
        axes.scatter(np.ones(len(drawn)), lines[0], s=10, marker="_", linewidths=0.8, color=colours)
    else:
        points = np.stack([np.broadcast_to(epochs[:, None], lines.shape), lines], axis=-1).transpose(1, 0, 2)
        rasterized = lines.size > MAX_VECTOR_POINTS
        axes.add_collection(
            LineCollection(points, colors=colours, linewidths=0.6, rasterized=rasterized), autolim=False
        )
    axes.plot(epochs, np.median(values, axis=1)[shown], color="black", linewidth=1.5)
    if threshold is not None:
        axes.axhline(threshold, color="black", linewidth=0.9, linestyle="--")
    pad = 0.02 * max(len(values) - 1, 1)
    axes.set_xlim(1 - pad, len(values) + pad)
    style_axes(axes)


def _gate_legend(threshold: float | None) -> list[Line2D]:
    median = Line2D([], [], color="black", linewidth=1.5, label="median")
    if threshold is None:
        return [Line2D([], [], color=ALIVE, label="gate"), median]
    return [
        Line2D([], [], color=ALIVE, label="ends above"),
        Line2D([], [], color=DEAD, label="ends below"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.9, label=f"threshold {threshold:g}"),
        median,
    ]


def gates_map(run: Run, history: Mapping[str, np.ndarray]) -> Figure:
    """Draw each gate as a row of colours over the epochs; arguments as for :func:`gates_figure`."""
    stages = {stage: values.T for stage, values in _stack_by_stage(history).items()}
    rows = np.concatenate([values[np.argsort(-values[:, -1], kind="stable")] for values in stages.values()])
    threshold = gate_threshold(run)
    low, high = np.log10(_value_range(rows, threshold))
    with figure_style():
        figure = new_figure(6.5, 6.0, run.name)
        axes = figure.add_subplot()
        image = axes.imshow(
            _downsample(np.log10(np.clip(rows, 10**low, 10**high)), 700, 400), aspect="auto", interpolation="nearest",
            extent=(0.5, rows.shape[1] + 0.5, len(rows), 0), vmin=low, vmax=high,
            cmap=_gate_colours((np.log10(threshold) - low) / (high - low) if threshold else 0.0),
        )  # fmt: skip
        bounds = np.cumsum([0, *map(len, stages.values())])
        for bound in bounds[1:-1]:
            axes.axhline(bound, color="black", linewidth=0.8)
        _style_stage_axis(axes, list(stages), bounds)
        _style_epoch_axis(axes, "epoch of sparse training")
        axes.set_title(f"{len(rows):,} gates")
        bar = figure.colorbar(image, ax=axes, shrink=0.6)
        bar.set_label("effective gate (output deviation)")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:g}}}$"))
    return figure


def _gate_colours(threshold: float) -> LinearSegmentedColormap:
    """Return white to orange up to the threshold (0 to 1 on the scale), blue to navy above: darker is more."""
    threshold = float(np.clip(threshold, 0, 1))
    stops = [(0.0, "#FFFFFF"), (threshold, "#E9A93A"), (threshold, "#5AA5DC"), (1.0, "#06264D")]
    colours = stops if 0 < threshold < 1 else [stops[2][1], stops[3][1]]
    return LinearSegmentedColormap.from_list("gates", colours, N=512)


def _downsample(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Average neighbours down to the number of visible pixels."""
    for axis, limit in ((0, rows), (1, columns)):
        if values.shape[axis] > limit:
            starts = np.unique(np.linspace(0, values.shape[axis], limit, endpoint=False).astype(int))
            counts = np.diff([*starts, values.shape[axis]])
            sums = np.add.reduceat(values, starts, axis=axis)
            values = sums / (counts[:, None] if axis == 0 else counts)
    return values


def _style_stage_axis(axes: Axes, names: list[str], bounds: np.ndarray) -> None:
    """Label each stage at its middle, unless it is too close to the previous label."""
    labels, last = {}, -np.inf
    for middle, name in zip((bounds[:-1] + bounds[1:]) / 2, names, strict=True):
        if middle - last >= bounds[-1] / 30:
            labels[middle] = escape_text(shorten(name, 24))
            last = middle
    axes.set_yticks(list(labels), list(labels.values()))
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("gates, by stage of the network")


def alive_figure(run: Run, history: Mapping[str, np.ndarray]) -> Figure:
    """Plot the share of gates above the threshold after each epoch, a line for each stage of the network."""
    threshold = gate_threshold(run) or 0.0
    with figure_style():
        figure = new_figure(7.5, 4.2, run.name)
        axes = figure.add_subplot()
        for index, (stage, values) in enumerate(_stack_by_stage(history, limit=len(COLOURS)).items()):
            axes.plot(
                np.arange(1, len(values) + 1), 100 * (values > threshold).mean(axis=1), color=COLOURS[index],
                linestyle=DASHES[index], linewidth=1.5, marker=MARKERS[index], markersize=4,
                markevery=max(1, len(values) // 12),
                label=f"{escape_text(shorten(stage, 28))} ({values.shape[1]:,} gates)",
            )  # fmt: skip
        total = _alive_channels(run)
        if len(total):
            axes.plot(total.index, total, color="black", linewidth=2.4, alpha=0.75, zorder=1.5, label="all channels")
            if len(total) == 1:
                axes.plot(total.index, total, "k_", markersize=12)
        axes.set_ylabel("alive (%)")
        axes.set_ylim(0, 104)
        _style_epoch_axis(axes, "epoch of sparse training")
        axes.set_title(f"gates above the threshold {threshold:g}")
        style_axes(axes)
        figure.legend(loc="outside right center", frameon=False, fontsize=8, handlelength=3)
    return figure


def _alive_channels(run: Run) -> pd.Series:
    """Return epoch → channels above the threshold, in percent of all."""
    table = run.metrics
    if not {"stage", "epoch", "alive", "of"} <= set(table.columns):
        return pd.Series(dtype=float)
    table = table[table["stage"] == "train"]
    total = _numbers(table, "of")
    share = 100 * _numbers(table, "alive") / total.where(total > 0)
    return pd.Series(share.to_numpy(), index=_numbers(table, "epoch").to_numpy()).dropna()
