"""What several figures ask of a run: the gates in the order of the network, its stages, its metrics by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunekit.reporting.loader import PARTS, Run

_METRICS = {
    "max_f": "max F-measure",
    "mae": "mean absolute error",
    "s_measure": "S-measure",
    "max_e": "max E-measure",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
}
_LOWER_IS_BETTER = {"mae", "mse", "rmse", "error", "loss"}


def gates(run: Run) -> dict[str, np.ndarray]:
    """Norm → its effective gates, (epochs, channels); of a training that goes on, those up to its newest training
    state."""
    if not run.gates.size:
        return {}
    values, norms = run.gates.to_numpy(np.float64), run.gates.columns.get_level_values(0).to_numpy()
    return {str(norm): values[:, norms == norm] for norm in dict.fromkeys(norms)}


def stages_of(names: Sequence[str], most: int = 8) -> dict[str, list[str]]:
    """Stage → its names: those that begin alike, in their order. Neighbours share a stage where there are too many.

    What all names begin with is left out, such as the "model" of "model.stage1.0" and "model.stage2.0".
    """
    split = [name.split(".") for name in names]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    found: dict[str, list[str]] = {}
    for name, parts in zip(names, split, strict=True):
        found.setdefault(parts[common], []).append(name)
    if len(found) <= most:
        return found
    merged = {}
    for chunk in np.array_split(np.array(list(found), object), most):
        label = str(chunk[0]) if len(chunk) == 1 else f"{chunk[0]} … {chunk[-1]}"
        merged[label] = [name for key in chunk for name in found[key]]
    return merged


def threshold(run: Run) -> float | None:
    """The effective gate at and below which a channel goes, as the recipe has it."""
    return number(run.setting("slim.threshold"))


def main_metric(run: Run) -> str | None:
    """The metric that its models are compared by: the first that they hold."""
    for part in PARTS:
        for name, value in (run.summary.get(part, {}).get("metrics") or {}).items():
            if number(value) is not None:
                return str(name)
    return None


def metric_title(name: str) -> str:
    """What a metric is called in full; the name itself where we do not know it."""
    return _METRICS.get(name, name)


def lower_is_better(name: str) -> bool:
    """Whether less of this metric is better."""
    return name in _LOWER_IS_BETTER


def number(value: object) -> float | None:
    """The value where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(value)
