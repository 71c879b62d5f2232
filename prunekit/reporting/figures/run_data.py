"""Data of a run that several figures use: gates, stages of the network, metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunekit.reporting.figures.style import common_parts
from prunekit.reporting.loader import MODELS, Run

_METRIC_TITLES = {
    "max_f": "max F-measure",
    "mae": "mean absolute error",
    "s_measure": "S-measure",
    "max_e": "max E-measure",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
}
_LOWER_IS_BETTER = {"mae", "mse", "rmse", "error", "loss"}


def gate_history(run: Run) -> dict[str, np.ndarray]:
    """Return norm → effective gates, [epochs, channels]; during training, up to the newest checkpoint."""
    if not run.gates.size:
        return {}
    values, norms = run.gates.to_numpy(np.float64), run.gates.columns.get_level_values(0).to_numpy()
    return {str(norm): values[:, norms == norm] for norm in dict.fromkeys(norms)}


def group_by_stage(names: Sequence[str], limit: int = 8) -> dict[str, list[str]]:
    """Group dotted names by their first part, in order, ignoring a prefix that all of them share.

    If there are more than ``limit`` groups, neighbours are merged.
    """
    common = common_parts(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[common], []).append(name)
    if len(groups) <= limit:
        return groups
    merged = {}
    for chunk in np.array_split(np.array(list(groups), object), limit):
        label = str(chunk[0]) if len(chunk) == 1 else f"{chunk[0]} … {chunk[-1]}"
        merged[label] = [name for key in chunk for name in groups[key]]
    return merged


def gate_threshold(run: Run) -> float | None:
    """Return the effective gate at and below which a channel is pruned, from the recipe."""
    return finite_number(run.setting("slim.threshold"))


def main_metric(run: Run) -> str | None:
    """Return the metric by which models are compared: the first that a model has."""
    for model in MODELS:
        for name, value in run.model_metrics(model).items():
            if finite_number(value) is not None:
                return str(name)
    return None


def metric_title(name: str) -> str:
    return _METRIC_TITLES.get(name, name)


def lower_is_better(name: str) -> bool:
    return name in _LOWER_IS_BETTER


def finite_number(value: object) -> float | None:
    """Return the value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(value)
