"""Figures of training: losses, λ and metrics by epoch, and the history of the gates."""

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

from prunekit.reporting.columns import metric
from prunekit.reporting.figures import style
from prunekit.reporting.figures.run_data import gate_cut, gate_history, group_by_stage
from prunekit.reporting.figures.style import COLORS, DASHES, ReportFigure, escape_text, points, shorten, style_axes
from prunekit.reporting.loader import Run

STAGE_TITLES = {"train": "sparse training", "finetune": "fine-tuning", "baseline": "baseline"}
MAX_LINES = 48  # in one panel; more cannot be distinguished
MAX_VECTOR_POINTS = 1000  # in one panel; beyond it, a rasterized SVG is smaller
ALIVE, DEAD = COLORS[0], COLORS[1]


def training_figures(run: Run) -> Iterator[ReportFigure]:
    """Yield the figures of the training of a run, complete or not; none before the first epoch."""
    rows, constant = _training_rows(run.metrics)
    if rows:
        yield ReportFigure(
            "training",
            "Training",
            "Means over each epoch, with an axis of its own for each training; λ is the weight of the decay."
            + (f" Constant, and not drawn: {', '.join(constant)}." if constant else ""),
            training_figure(run),
        )
    history, cut = gate_history(run), gate_cut(run)
    if not history:
        return
    yield ReportFigure(
        "gates",
        "Gates during training",
        f"Effective gates |γ|·√(v/(v+ε)) during sparse training, by stage of the network. {cut.note}Of a stage with "
        f"many gates, {MAX_LINES} are drawn, at equal distances from the largest to the smallest; the median is that "
        "of all. Values below the axis are drawn at its lower end.",
        gates_figure(run, history),
    )
    colors = f"Blue is above the {cut.name}, orange below; paler" if cut.value else "Paler"
    yield ReportFigure(
        "gates_map",
        "All gates during training",
        "All effective gates, a row each, by stage of the network and within a stage by the last value. "
        f"{colors} is closer to zero.",
        gates_map(run, history),
    )
    if cut.value is not None:
        yield ReportFigure(
            "alive",
            f"Gates above the {cut.name}",
            f"The share of the gates of each stage of the network that are above the {cut.name} {cut.value:.3g} after "
            f"each epoch of sparse training. {cut.note or 'The thick line is the share of all channels. '}".strip(),
            alive_figure(run, history),
        )


# ---- loss, penalty, λ


def training_figure(run: Run) -> Figure:
    """Plot what changes of loss, penalty, λ and metrics over the epochs of each training."""
    table = run.metrics
    stages = list(dict.fromkeys(table["stage"]))
    rows, _ = _training_rows(table)
    with style.figure_style():
        heights = [0.8 if title.startswith("λ") else 1.5 for title in rows]
        figure = style.new_figure(max(6.5, 1.0 + 3.2 * len(stages)), 0.8 + sum(heights))
        panels = figure.subplots(len(rows), len(stages), sharex="col", squeeze=False, height_ratios=heights)
        for row, (title, columns) in zip(panels, rows.items(), strict=True):
            for axes, stage in zip(row, stages, strict=True):
                _plot_epochs(axes, table[table["stage"] == stage], columns, title)
                axes.set_ylabel(title)
        for axes, stage in zip(panels[0], stages, strict=True):
            axes.set_title(STAGE_TITLES.get(stage, escape_text(shorten(str(stage), 32))))
        for axes in panels[-1]:
            axes.set_xlabel("epoch")
        figure.align_ylabels()
    return figure


def _training_rows(table: pd.DataFrame) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return title of the y axis → column → label of its line, for rows that change, and "label value" of the others.

    A row changes if one of its columns does in one of the trainings.
    """
    if "stage" not in table or "epoch" not in table or not len(table):
        return {}, []
    metrics = {c: metric(c.removeprefix("metrics.")).title for c in table.columns if c.startswith("metrics.")}
    rows: dict[str, dict[str, str]] = {
        "loss": {"loss": "loss"},
        "penalty (with λ)": {"penalty": "penalty"},
        "λ (weight)": {"lambda": "λ"},
        next(iter(metrics.values())) if len(metrics) == 1 else "metrics (validation)": metrics,
    }
    changing, constant = {}, []
    for title, columns in rows.items():
        known = {c: escape_text(shorten(n, 32)) for c, n in columns.items() if _numbers(table, c).notna().any()}
        values = {c: _numbers(table, c).groupby(table["stage"]).agg(["min", "max", "count"]) for c in known}
        # A single epoch is worth a point.
        if any((v["min"] < v["max"]).any() or v["count"].max() < 2 for v in values.values()):
            changing[title] = known
            continue
        for column, own in values.items():
            levels = [f"{level:.4g}" for level in own["max"].dropna().unique() if level]
            constant += [f"{known[column]} {' and '.join(levels)}"] if levels else []
    return changing, constant


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
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3 if title.startswith("λ") else 5))
        axes.margins(y=0.08)


def _plot_epochs(axes: Axes, table: pd.DataFrame, columns: Mapping[str, str], title: str) -> None:
    epochs = _numbers(table, "epoch")
    _style_value_axis(axes, table, columns, title)
    empty = True
    for index, (column, label) in enumerate(columns.items()):
        values = _numbers(table, column)
        if axes.get_yscale() == "log" or (title.startswith(("penalty", "λ")) and not values.any()):
            values = values.where(values > 0)
        if not values.notna().any():
            continue
        empty = False
        # Epochs without validation leave no gap between those with one.
        shown = values.notna() if column.startswith("metrics.") else slice(None)
        axes.plot(
            epochs[shown], values[shown], color=COLORS[index % len(COLORS)],
            linestyle=DASHES[index % len(DASHES)], linewidth=1.3, markersize=3, label=label,
            marker=None if len(epochs) > 30 else style.MARKERS[index % len(style.MARKERS)],
        )  # fmt: skip
    style_axes(axes)
    _style_epoch_axis(axes, nbins=6)
    if empty:
        axes.text(
            0.5,
            0.5,
            "no decay" if title.startswith(("penalty", "λ")) else "none",
            transform=axes.transAxes,
            ha="center",
            color="0.35",
        )
        axes.set_yticks([])
    elif len(columns) > 1:
        axes.legend(frameon=False, fontsize=points(7.5), handlelength=2.4)


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

    ``history`` maps each norm to its effective gates, [epochs, channels].
    """
    cut = gate_cut(run)
    stages = _stack_by_stage(history)
    low, high = _value_range(np.concatenate(list(stages.values()), axis=1), cut.value)
    with style.figure_style():
        columns = min(len(stages), 4 if len(stages) > 6 else 3 if len(stages) > 4 else 2)
        rows = -(-len(stages) // columns)
        figure = style.new_figure(max(6.5, 0.9 + 2.3 * columns), 0.9 + 1.9 * rows)
        if style.is_narrow(figure) and columns > 2:
            columns, rows = 2, -(-len(stages) // 2)
            figure.set_figheight(0.9 + 1.3 * rows)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (stage, values) in zip(panels, stages.items(), strict=False):
            _plot_gates(axes, np.maximum(values, low), cut.value)
            axes.set_title(f"{escape_text(shorten(stage, 28))} ({values.shape[1]:,})", fontsize=points(9))
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
            axes.set_xlabel("epoch" if style.is_narrow(figure) else "epoch of sparse training")
        figure.supylabel("effective gate (output deviation)", fontsize=points(9))
        keys = [Line2D([], [], color="black", linewidth=1.5, label="median")]
        if cut.value is None:
            keys.insert(0, Line2D([], [], color=ALIVE, label="gate"))
        else:
            keys[:0] = [
                Line2D([], [], color=c, label=f"ends {where}") for c, where in ((ALIVE, "above"), (DEAD, "below"))
            ]
            line = {"color": "black", "linestyle": "--", "linewidth": 0.9}
            keys.insert(2, Line2D([], [], **line, label=f"{cut.name} {cut.value:.3g}"))
        ncols = 2 if style.is_narrow(figure) else 4
        figure.legend(handles=keys, loc="outside lower center", ncols=ncols, frameon=False)
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
    colors = [ALIVE if alive else DEAD for alive in is_alive]
    if len(values) == 1:
        axes.scatter(np.ones(len(drawn)), lines[0], s=10, marker="_", linewidths=0.8, color=colors)
    else:
        points = np.stack([np.broadcast_to(epochs[:, None], lines.shape), lines], axis=-1).transpose(1, 0, 2)
        rasterized = lines.size > MAX_VECTOR_POINTS
        axes.add_collection(LineCollection(points, colors=colors, linewidths=0.6, rasterized=rasterized), autolim=False)
    axes.plot(epochs, np.median(values, axis=1)[shown], color="black", linewidth=1.5)
    if threshold is not None:
        axes.axhline(threshold, color="black", linewidth=0.9, linestyle="--")
    pad = 0.02 * max(len(values) - 1, 1)
    axes.set_xlim(1 - pad, len(values) + pad)
    style_axes(axes)


def gates_map(run: Run, history: Mapping[str, np.ndarray]) -> Figure:
    """Draw each gate as a row of colors over the epochs; arguments as for :func:`gates_figure`."""
    stages = {stage: values.T for stage, values in _stack_by_stage(history).items()}
    rows = np.concatenate([values[np.argsort(-values[:, -1], kind="stable")] for values in stages.values()])
    threshold = gate_cut(run).value
    low, high = np.log10(_value_range(rows, threshold))
    with style.figure_style():
        figure = style.new_figure(6.5, 5.7)
        axes = figure.add_subplot()
        image = axes.imshow(
            _downsample(np.log10(np.clip(rows, 10**low, 10**high)), 700, 400), aspect="auto", interpolation="nearest",
            extent=(0.5, rows.shape[1] + 0.5, len(rows), 0), vmin=low, vmax=high,
            cmap=_gate_colors((np.log10(threshold) - low) / (high - low) if threshold else 0.0),
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


def _gate_colors(threshold: float) -> LinearSegmentedColormap:
    """Return white to orange up to the threshold (0 to 1 on the scale), blue to navy above: darker is more."""
    threshold = float(np.clip(threshold, 0, 1))
    stops = [(0.0, "#FFFFFF"), (threshold, "#E9A93A"), (threshold, "#5AA5DC"), (1.0, "#06264D")]
    colors = stops if 0 < threshold < 1 else [stops[2][1], stops[3][1]]
    return LinearSegmentedColormap.from_list("gates", colors, N=512)


def _downsample(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Average neighbors down to the number of visible pixels."""
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
    """Plot the share of gates above the cut after each epoch, a line for each stage of the network."""
    cut = gate_cut(run)
    threshold = cut.value or 0.0
    with style.figure_style():
        figure = style.new_figure(7.5, 3.9)
        axes = figure.add_subplot()
        for index, (stage, values) in enumerate(_stack_by_stage(history, limit=len(COLORS)).items()):
            axes.plot(
                np.arange(1, len(values) + 1), 100 * (values > threshold).mean(axis=1), color=COLORS[index],
                linestyle=DASHES[index], linewidth=1.5, marker=style.MARKERS[index], markersize=4,
                markevery=max(1, len(values) // 12),
                label=f"{escape_text(shorten(stage, 28))} ({values.shape[1]:,} gates)",
            )  # fmt: skip
        total = _alive_channels(run) if cut.is_live else pd.Series(dtype=float)
        if len(total):
            axes.plot(total.index, total, color="black", linewidth=2.4, alpha=0.75, zorder=1.5, label="all channels")
            if len(total) == 1:
                axes.plot(total.index, total, "k_", markersize=12)
        axes.set_ylabel("alive (%)")
        axes.set_ylim(0, 104)
        _style_epoch_axis(axes, "epoch of sparse training")
        axes.set_title(f"gates above the {cut.name} {threshold:.3g}")
        style_axes(axes)
        figure.legend(loc="outside right center", frameon=False, fontsize=points(8), handlelength=3)
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
