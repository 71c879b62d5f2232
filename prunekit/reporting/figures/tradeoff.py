"""Figures that compare models: quality against cost, and the totals of several runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from prunekit.reporting.columns import metric as known_metric
from prunekit.reporting.figures import style
from prunekit.reporting.figures.labels import place_labels
from prunekit.reporting.figures.run_data import finite_number, main_metric
from prunekit.reporting.figures.style import ReportFigure, escape_text, points, shorten, style_axes
from prunekit.reporting.loader import MODELS, Run
from prunekit.reporting.number_format import format_size, short_number
from prunekit.reporting.tables import bench_settings

COSTS = {"params": "parameters", "macs": "MACs", "latency": "latency"}
MAX_DISTANCE = 32  # 1/72 inch between a model and the name of its run; further away it is ambiguous
MAX_KEY = 60  # runs in the key of numbers


class Point(NamedTuple):
    """A model of a run with its cost and quality."""

    run: str
    model: str
    cost: float
    quality: float


def tradeoff_figures(runs: Sequence[Run]) -> Iterator[ReportFigure]:
    """Yield the figures that compare models.

    Models without the numbers are left out, and so are figures of fewer than two models.
    """
    metrics = list(dict.fromkeys(metric for run in runs if (metric := main_metric(run)) is not None))
    for metric in metrics:
        compared = [run for run in runs if main_metric(run) == metric]
        suffix = f"_{re.sub(r'[^A-Za-z0-9]+', '-', metric)}" if len(metrics) > 1 else ""
        trivial = _trivial(compared, metric)
        for cost, title in COSTS.items():
            setting = _common_setting(compared) if cost == "latency" else ""
            models = _points(compared, metric, cost, setting)
            if len({(point.cost, point.quality) for point in models}) < 2:
                continue
            note = {"params": "", "macs": _sizes_note(compared), "latency": setting}[cost]
            capitalized = known_metric(metric).title[:1].upper() + known_metric(metric).title[1:]
            better = "lower" if known_metric(metric).lower_is_better else "upper"
            line = "" if trivial is None else " The dotted line is the best trivial predictor, which needs no network."
            yield ReportFigure(
                f"tradeoff_{cost}{suffix}",
                f"{capitalized} against {title}",
                "All measured models; arrows lead from the dense to the slim and the fine-tuned model of a run. The "
                f"{better} left is better. Rings mark the Pareto front: models that no other model dominates.{line}",
                tradeoff_figure(models, metric, cost, note, trivial),
            )
    if len(runs) > 1 and any(run.model(model) for run in runs for model in MODELS):
        yield ReportFigure(
            "totals",
            "Totals by run",
            "Parameters and MACs of every model of these runs; one multiply-add counts as one MAC.",
            totals_figure(runs),
        )


def _trivial(runs: Sequence[Run], metric: str) -> float | None:
    """Return the quality of the best trivial predictor, if it is the same for all runs: they share the data."""
    best = min if known_metric(metric).lower_is_better else max
    values = [[finite_number(v.get(metric)) for v in run.summary.get("reference", {}).values()] for run in runs]
    known = {best(own) if (own := [v for v in of_run if v is not None]) else None for of_run in values}
    return known.pop() if len(known) == 1 else None


def _points(runs: Sequence[Run], metric: str, cost: str, setting: str) -> list[Point]:
    found = []
    for run in runs:
        costs = {model: run.model(model).get(cost) for model in MODELS}
        if cost == "latency":
            # The first measurement of a model counts.
            rows = run.bench[[own == setting for own in bench_settings(run)]][::-1]
            costs = dict(zip(rows["model"], rows["median_ms"], strict=True)) if len(rows) else {}
        for model in MODELS:
            quality, value = finite_number(run.model_metrics(model).get(metric)), finite_number(costs.get(model))
            if quality is not None and value is not None and value > 0:
                found.append(Point(run.name, model, value, quality))
    return found


def _sizes_note(runs: Sequence[Run]) -> str:
    sizes = {run.size for run in runs}
    return format_size(*sizes) if len(sizes) == 1 else "(each at the image size of its run)"


def _common_setting(runs: Sequence[Run]) -> str:
    """Return the setting in which most models were measured: other latencies are not comparable."""
    models: dict[str, set[tuple[str, str]]] = {}
    for run in runs:
        for setting, model in zip(bench_settings(run), run.bench.get("model", ()), strict=True):
            models.setdefault(setting, set()).add((run.name, model))
    return max(models, key=lambda setting: len(models[setting]), default="")


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Return the indices of the points that no other point dominates, by cost.

    A point dominates another if it costs no more, is no worse, and differs in one of the two; higher qualities are
    better. Of equal points all are on the front.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    front: list[int] = []
    best = -np.inf
    for i in order:
        equal = bool(front) and (costs[i], qualities[i]) == (costs[front[-1]], qualities[front[-1]])
        if qualities[i] > best or equal:
            front.append(i)
            best = qualities[i]
    return front


def tradeoff_figure(models: Sequence[Point], metric: str, cost: str, note: str, trivial: float | None = None) -> Figure:
    """Plot quality against cost: a marker for each model, the Pareto front as steps, runs named at their last model."""
    names = list(dict.fromkeys(point.run for point in models))
    costs, qualities = [point.cost for point in models], [point.quality for point in models]
    sign = -1 if known_metric(metric).lower_is_better else 1
    front = pareto_front(costs, [sign * value for value in qualities])
    with style.figure_style():
        figure = style.new_figure(6.5, 5.0)
        axes = figure.add_subplot()
        _style_cost_axis(axes, costs, cost, note)
        better = "lower is better" if sign < 0 else "higher is better"
        axes.set_ylabel(f"{escape_text(shorten(known_metric(metric).title, 40))} ({better})")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        levels = qualities if trivial is None else [*qualities, trivial]
        low, high = min(levels), max(levels)
        pad = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
        # Fractions end at 1, with room for a marker.
        axes.set_ylim(low - pad, min(high + pad, max(1.0, high) + 0.3 * pad) if low >= 0 and high <= 1 else high + pad)
        style_axes(axes, "both")
        if trivial is not None:
            axes.axhline(trivial, color="0.35", linestyle=":", linewidth=1.2, zorder=1)
        for index, name in enumerate(names):
            own = [point for point in models if point.run == name]
            color = style.COLORS[index % 6]
            pruned = [(point.cost, point.quality) for point in own if point.model != "baseline"]
            for tail, head in pairwise(pruned):
                arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 4, "shrinkB": 4, "linewidth": 0.9}
                axes.add_patch(FancyArrowPatch(tail, head, color=color, alpha=0.8, zorder=1.5, **arrow))
            for point in own:
                axes.plot(
                    point.cost, point.quality, style.MODEL_STYLES[point.model].marker, color=color, markersize=6,
                    markeredgecolor="white", markeredgewidth=0.6, zorder=3,
                )  # fmt: skip
        steps = _draw_front(axes, [costs[i] for i in front], [qualities[i] for i in front])
        lines = steps if trivial is None else [*steps, (steps[-1][0], trivial), (axes.get_xlim()[0], trivial)]
        _name_runs(axes, models, names, lines, trivial is not None)
    return figure


def _draw_front(axes: Axes, costs: Sequence[float], qualities: Sequence[float]) -> list[tuple[float, float]]:
    """Draw the front and return its corners, up to the edge of the axes."""
    (left, right), limits = axes.get_xlim(), axes.get_ylim()
    corners = [(costs[0], qualities[0])]
    for cost, quality in zip(costs[1:], qualities[1:], strict=True):
        corners += [(cost, corners[-1][1]), (cost, quality)]
    corners.append((right, corners[-1][1]))
    axes.plot(*zip(*corners, strict=True), color="black", linestyle="--", linewidth=1, zorder=1)
    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 0.9}
    axes.plot(costs, qualities, "o", **ring)
    axes.set_xlim(left, right)
    axes.set_ylim(limits)
    return corners


def _style_cost_axis(axes: Axes, costs: Sequence[float], cost: str, note: str) -> None:
    latency = f"latency, median of one batch (ms)\n{escape_text(note)}"
    axes.set_xlabel({"params": "parameters", "macs": f"MACs {note}", "latency": latency}[cost])
    low, high = min(costs), max(costs)
    if high > 8 * low:
        axes.set_xscale("log")
        margin = (high / low) ** 0.1
        low, high = low / margin, high * margin
        exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        ticks = [tick for e in exponents for d in (1, 2, 5) if low <= (tick := d * 10.0**e) <= high]
        if len(ticks) > 7:
            ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 7)]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        pad = 0.1 * (high - low) or 0.1 * high
        low, high = max(0.0, low - pad), high + pad
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlim(low, high)
    style.format_counts(axes.xaxis)


def _name_runs(axes: Axes, models: Sequence[Point], names: Sequence[str], avoided: Any, has_trivial: bool) -> None:
    """Name the runs next to their last models; if there is no room, number them, with a key below."""
    figure: Any = axes.figure
    last = {point.run: (point.cost, point.quality) for point in models}
    obstacles = [(point.cost, point.quality) for point in models]
    styles = [style.MODEL_STYLES[model] for model in MODELS if any(point.model == model for point in models)]
    keys = [Line2D([], [], color="0.35", marker=look.marker, linestyle="", label=look.label) for look in styles]
    ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
    keys.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="Pareto front", **ring))
    if has_trivial:
        keys.append(Line2D([], [], color="0.35", linestyle=":", linewidth=1.2, label="trivial predictor"))
    legend = {"handles": keys, "ncols": min(len(keys), 2 if style.is_narrow(figure) else 5), "frameon": False}
    figure.legend(loc="outside lower center", **legend)
    texts, lines = len(axes.texts), len(axes.lines)
    labels = [escape_text(shorten(name, 28)) for name in names]
    if all(place_labels(axes, [last[name] for name in names], labels, obstacles, avoided, MAX_DISTANCE)):
        return
    for artist in [*axes.texts[texts:], *axes.lines[lines:]]:
        artist.remove()
    numbered = names[:MAX_KEY]
    key = [f"{number}  {escape_text(shorten(name, 36))}" for number, name in enumerate(numbered, 1)]
    key += [f"… and {len(names) - MAX_KEY} more"] if len(names) > MAX_KEY else []
    columns = 1 if style.is_narrow(figure) else 3
    figure.set_layout_engine("constrained")
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(key) // columns))
    figure.legends[0].remove()
    figure.legend(loc="outside upper center", **legend)
    figure.legend(
        handles=[Line2D([], [], linestyle="", label=text) for text in key], loc="outside lower center", ncols=columns,
        frameon=False, fontsize=points(7.5), handlelength=0, handletextpad=0,
    )  # fmt: skip
    numbers = [str(number) for number in range(1, len(numbered) + 1)]
    place_labels(axes, [last[name] for name in numbered], numbers, obstacles, avoided)


def totals_figure(runs: Sequence[Run]) -> Figure:
    """Draw parameters and MACs of several runs side by side, a bar for each model."""
    models = [model for model in MODELS if any(run.model(model) for run in runs)]
    with style.figure_style():
        figure = style.new_figure(max(6.5, 1.2 + 1.3 * len(runs)), 6.8)
        panels = figure.subplots(2, 1, sharex=True)
        width = 0.8 / max(len(models), 1)
        for axes, (quantity, title) in zip(panels, list(COSTS.items())[:2], strict=True):
            for index, model in enumerate(models):
                values = {i: v for i, run in enumerate(runs) if (v := run.model(model).get(quantity)) is not None}
                positions = [i - 0.4 + (index + 0.5) * width for i in values]
                look = style.bar_style(index) | {"color": style.MODEL_STYLES[model].color}
                label = style.MODEL_STYLES[model].label if axes is panels[0] else None
                bars = axes.bar(positions, list(values.values()), width=width * 0.94, label=label, **look)
                if len(runs) <= 30:
                    axes.bar_label(
                        bars, list(map(short_number, values.values())), fontsize=points(7), padding=2, rotation=90
                    )
            axes.set_ylabel(title)
            axes.margins(y=0.28)
            style.format_counts(axes.yaxis)
            axes.set_ylim(bottom=0)
            style_axes(axes)
        _style_run_axis(panels[1], runs)
        panels[0].set_title("Totals by run and model")
        if models:
            figure.legend(loc="outside lower center", ncols=len(models), frameon=False)
    return figure


def _style_run_axis(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.set_xlabel("run (image size of its MACs)")
    if len(runs) <= 9:
        # Wrapped names need less room than rotated ones of two lines.
        names = ["\n".join([*wrap(escape_text(shorten(run.name, 48)), 14), format_size(run.size)]) for run in runs]
        axes.set_xticks(range(len(runs)), names)
        return
    step = -(-len(runs) // 60)
    names = [escape_text(f"{shorten(run.name, 28)} {format_size(run.size)}") for run in runs]
    axes.set_xticks(range(0, len(runs), step), names[::step], rotation=90, fontsize=points(7))
