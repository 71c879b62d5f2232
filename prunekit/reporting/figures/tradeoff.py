"""Models beside one another: what they cost against how good they are, and the totals of several runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from prunekit.reporting.figures.labels import place_labels
from prunekit.reporting.figures.run_data import lower_is_better, main_metric, metric_title, number
from prunekit.reporting.figures.style import (
    COLOURS,
    HATCHES,
    LOOKS,
    Drawing,
    count_axis,
    new_figure,
    number_axis,
    plain,
    quiet,
    shorten,
    styled,
)
from prunekit.reporting.loader import PARTS, Run
from prunekit.reporting.number_format import short_number, size_text

COSTS = ("params", "macs", "latency")
NEAR = 32  # 1/72 inch from a model to the name of its run: beyond it one cannot tell whose it is
KEYED = 60  # runs in a key of numbers


@dataclass(frozen=True)
class Point:
    """A model of a run: what it costs, and how good it is."""

    run: str
    part: str
    cost: float
    quality: float


def tradeoff_drawings(runs: Sequence[Run]) -> Iterator[Drawing]:
    """The drawings that set models side by side; a model without the numbers is left out, and so is a drawing of
    fewer than two models."""
    metrics = list(dict.fromkeys(metric for run in runs if (metric := main_metric(run)) is not None))
    for metric in metrics:
        compared = [run for run in runs if main_metric(run) == metric]
        # Runs of several tasks share no axis.
        ending = f"_{re.sub(r'[^A-Za-z0-9]+', '-', metric)}" if len(metrics) > 1 else ""
        for cost in COSTS:
            for note, held in _latencies(compared) if cost == "latency" else [(_macs_note(compared, cost), compared)]:
                points = _points(held, metric, cost, note)
                if len({(point.cost, point.quality) for point in points}) > 1:
                    yield _tradeoff(points, metric, cost, note, f"tradeoff_{cost}{ending}")
    if len(runs) > 1 and any(run.summary.get(part) for run in runs for part in PARTS):
        yield Drawing(
            "totals",
            "Totals by run",
            "Parameters and MACs of every model of these runs; one multiply-add counts as one MAC.",
            totals_figure(runs),
        )


def _tradeoff(points: Sequence[Point], metric: str, cost: str, note: str, name: str) -> Drawing:
    words = {"params": "parameters", "macs": "MACs", "latency": "latency"}
    better = "lower" if lower_is_better(metric) else "upper"
    return Drawing(
        name,
        f"{metric_title(metric).capitalize()} against {words[cost]}",
        f"Every model that was measured; a thin line joins those of one run. Towards the {better} left is "
        "better: those ringed are the Pareto front, beaten by no other here.",
        tradeoff_figure(points, metric, cost, note),
    )


def _points(runs: Sequence[Run], metric: str, cost: str, note: str) -> list[Point]:
    found = []
    for run in runs:
        for part in PARTS:
            held = run.summary.get(part) or {}
            quality = number((held.get("metrics") or {}).get(metric))
            value = _latency(run, part, note) if cost == "latency" else number(held.get(cost))
            if quality is not None and value is not None and value > 0:
                found.append(Point(run.name, part, value, quality))
    return found


def _macs_note(runs: Sequence[Run], cost: str) -> str:
    sizes = {run.size for run in runs}
    if cost != "macs":
        return ""
    return size_text(*sizes) if len(sizes) == 1 else "(each at the image size of its run)"


def _settings(run: Run) -> list[tuple[str, str, float]]:
    """(how it was measured, model, median in ms) of each measurement of speed."""
    if "median_ms" not in run.bench:
        return []
    rows = []
    for row in run.bench.to_dict("records"):
        said = {key: row.get(key) for key in ("form", "size", "batch", "threads", "device")}
        held = {key: value for key, value in said.items() if isinstance(value, str) or number(value) is not None}
        words = [str(held[key]) for key in ("form", "size") if key in held]
        words += [f"{key} {held[key]:g}" for key in ("batch", "threads") if key in held]
        rows.append(
            (", ".join([*words, *([held["device"]] if "device" in held else [])]), row["model"], row["median_ms"])
        )
    return rows


def _latencies(runs: Sequence[Run]) -> list[tuple[str, Sequence[Run]]]:
    """The way of measuring that most models share: numbers of two ways share no axis."""
    shared: dict[str, set[tuple[str, str]]] = {}
    for run in runs:
        for setting, model, _ in _settings(run):
            shared.setdefault(setting, set()).add((run.name, model))
    return [(max(shared, key=lambda setting: len(shared[setting])), runs)] if shared else []


def _latency(run: Run, part: str, setting: str) -> float | None:
    return next((number(ms) for held, model, ms in _settings(run) if (held, model) == (setting, part)), None)


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """The indices of the points that no other point beats, by cost.

    A point beats another if it costs no more and is no worse, and differs from it in one of the two; more quality is
    better. Of equal points all are on the front.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    front, best = [], -np.inf
    for i in order:
        equal = bool(front) and (costs[i], qualities[i]) == (costs[front[-1]], qualities[front[-1]])
        if qualities[i] > best or equal:
            front.append(i)
            best = qualities[i]
    return front


def tradeoff_figure(points: Sequence[Point], metric: str, cost: str, note: str) -> Figure:
    """Quality against cost: a marker for each model, the Pareto front as steps, each run named at its last model."""
    names = list(dict.fromkeys(point.run for point in points))
    costs, qualities = [point.cost for point in points], [point.quality for point in points]
    sign = -1 if lower_is_better(metric) else 1
    front = pareto_front(costs, [sign * value for value in qualities])
    with styled():
        figure = new_figure(6.5, 5.0)
        axes = figure.add_subplot()
        for index, name in enumerate(names):
            own = [point for point in points if point.run == name]
            colour = COLOURS[index % 6]
            axes.plot(
                [p.cost for p in own], [p.quality for p in own], color=colour, linewidth=0.8, alpha=0.7, zorder=1.5
            )
            for point in own:
                axes.plot(
                    point.cost, point.quality, LOOKS[point.part].marker, color=colour, markersize=6,
                    markeredgecolor="white", markeredgewidth=0.6, zorder=3,
                )  # fmt: skip
        _cost_axis(axes, costs, cost, note)
        arrow = "lower is better" if sign < 0 else "higher is better"
        axes.set_ylabel(f"{plain(shorten(metric_title(metric), 40))} ({arrow})")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        low, high = min(qualities), max(qualities)
        pad = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
        # Shares end at 1; above it there is room for a marker.
        axes.set_ylim(low - pad, min(high + pad, max(1.0, high) + 0.3 * pad) if low >= 0 and high <= 1 else high + pad)
        quiet(axes, "both")
        steps = _front(axes, [costs[i] for i in front], [qualities[i] for i in front])
        _name_runs(figure, axes, points, names, steps)
    return figure


def _front(axes: Axes, costs: Sequence[float], qualities: Sequence[float]) -> list[tuple[float, float]]:
    """Draw the front; its corners, up to the edge of the axes."""
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


def _cost_axis(axes: Axes, costs: Sequence[float], cost: str, note: str) -> None:
    titles = {
        "params": "parameters",
        "macs": f"MACs {note}",
        "latency": f"latency, median of one batch (ms)\n{plain(note)}",
    }
    axes.set_xlabel(titles[cost])
    low, high = min(costs), max(costs)
    if high > 8 * low:
        axes.set_xscale("log")
        reach = (high / low) ** 0.1
        low, high = low / reach, high * reach
        ticks = [
            d * 10.0**e
            for e in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
            for d in (1, 2, 5)
        ]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 7:
            ticks = [tick for tick in ticks if f"{tick:e}"[0] == "1"]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 7)]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        pad = 0.1 * (high - low) or 0.1 * high
        low, high = max(0.0, low - pad), high + pad
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlim(low, high)
    count_axis(axes.xaxis)


def _name_runs(
    figure: Figure, axes: Axes, points: Sequence[Point], names: Sequence[str], steps: list[tuple[float, float]]
) -> None:
    """The runs by name beside their last models; where they do not fit, by number, with a key below."""
    last = {point.run: (point.cost, point.quality) for point in points}
    every = [(point.cost, point.quality) for point in points]
    parts = [part for part in PARTS if any(point.part == part for point in points)]
    keys = [Line2D([], [], color="0.35", marker=LOOKS[p].marker, linestyle="", label=LOOKS[p].label) for p in parts]
    ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
    keys.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="Pareto front", **ring))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    before = len(axes.texts), len(axes.lines)
    if all(place_labels(axes, [last[n] for n in names], [plain(shorten(n, 28)) for n in names], every, steps, NEAR)):
        return
    for artist in [*axes.texts[before[0] :], *axes.lines[before[1] :]]:
        artist.remove()
    shown = names[:KEYED]
    key = [f"{number}  {plain(shorten(name, 36))}" for number, name in enumerate(shown, 1)]
    key += [f"… and {len(names) - KEYED} more"] if len(names) > KEYED else []
    figure.set_layout_engine("constrained")
    lines = -(-len(key) // 3)
    figure.set_figheight(5.0 + 0.17 * lines)
    blank = [Line2D([], [], linestyle="", label=text) for text in key]
    figure.legends[0].remove()
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False)
    figure.legend(
        handles=blank, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5, handlelength=0, handletextpad=0
    )
    place_labels(axes, [last[name] for name in shown], [str(n) for n in range(1, len(shown) + 1)], every, steps)


def totals_figure(runs: Sequence[Run]) -> Figure:
    """Parameters and MACs of several runs side by side, a bar for each model that is there."""
    parts = [part for part in PARTS if any(run.summary.get(part) for run in runs)]
    with styled():
        figure = new_figure(max(6.5, 1.2 + 1.3 * len(runs)), 6.8)
        panels = figure.subplots(2, 1, sharex=True)
        width = 0.8 / max(len(parts), 1)
        for axes, quantity, title in zip(panels, ("params", "macs"), ("parameters", "MACs"), strict=True):
            for index, part in enumerate(parts):
                held = [(place, (run.summary.get(part) or {}).get(quantity)) for place, run in enumerate(runs)]
                at = [place - 0.4 + (index + 0.5) * width for place, value in held if value is not None]
                heights = [value for _, value in held if value is not None]
                bars = axes.bar(
                    at, heights, width=width * 0.94, color=LOOKS[part].colour, hatch=HATCHES[index % len(HATCHES)],
                    edgecolor="white", linewidth=0, label=LOOKS[part].label if axes is panels[0] else None,
                )  # fmt: skip
                if len(runs) <= 30:
                    axes.bar_label(
                        bars, [short_number(height) for height in heights], fontsize=7, padding=2, rotation=90
                    )
            axes.set_ylabel(title)
            axes.margins(y=0.28)
            number_axis(axes)
            quiet(axes)
        _run_axis(panels[1], runs)
        panels[0].set_title("Totals by run and model")
        if parts:
            figure.legend(loc="outside lower center", ncols=len(parts), frameon=False)
    return figure


def _run_axis(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.set_xlabel("run (size of the image that its MACs are counted on)")
    if len(runs) <= 9:
        # Folded, not turned: turned names of two lines take more room than the bars.
        names = ["\n".join([*wrap(plain(shorten(run.name, 48)), 14), size_text(run.size)]) for run in runs]
        axes.set_xticks(range(len(runs)), names)
        return
    every = -(-len(runs) // 60)
    names = [plain(f"{shorten(run.name, 28)} {size_text(run.size)}") for run in runs]
    axes.set_xticks(range(0, len(runs), every), names[::every], rotation=90, fontsize=7)
