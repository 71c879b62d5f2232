"""Data of a run that several figures use: gates, stages of the network, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prunekit.reporting.figures.style import common_parts
from prunekit.reporting.loader import MODELS, Run


def gate_history(run: Run) -> dict[str, np.ndarray]:
    """Return norm → effective gates, [epochs, channels]; during training, up to the newest checkpoint."""
    if not run.gates.size:
        return {}
    values, norms = run.gates.to_numpy(np.float64), run.gates.columns.get_level_values(0).to_numpy()
    return {str(norm): values[:, norms == norm] for norm in dict.fromkeys(norms)}


def group_by_stage(names: Sequence[str], limit: int = 8) -> dict[str, list[str]]:
    """Group dotted names by their first part, in order, ignoring a prefix that all of them share.

    If there are more than ``limit`` groups, neighbors are merged.
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


class GateCut(NamedTuple):
    """The effective gate at and below which channels are pruned.

    Args:
        value: None if it is unknown: with a target before the plan is made, or by another importance than the gate.
        name: "threshold", or "cut" where it was chosen to meet a target.
        note: a sentence for captions, with a space after it; empty for a threshold.
        is_live: whether the epochs' counts of living channels refer to it.
    """

    value: float | None
    name: str = "threshold"
    note: str = ""
    is_live: bool = True


def gate_cut(run: Run) -> GateCut:
    """Return the cut that was made, or for a run without a target the threshold of its recipe."""
    made = run.summary.get("kept", {}).get("cut")
    targets = run.setting("target")
    if isinstance(targets, dict) and any(value is not None for value in targets.values()):
        note = "The cut is the largest gate of a channel that was removed to meet the target. "
        return GateCut(made, "cut", note if made is not None else "", is_live=False)
    importance = run.setting("slim.importance")
    if (importance.get("name") if isinstance(importance, dict) else importance) not in (None, "gate"):
        return GateCut(None)
    return GateCut(finite_number(run.setting("slim.threshold")))


def main_metric(run: Run) -> str | None:
    """Return the metric by which models are compared: the first that a model has."""
    for model in MODELS:
        for name, value in run.model_metrics(model).items():
            if finite_number(value) is not None:
                return str(name)
    return None


def finite_number(value: object) -> float | None:
    """Return the value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(value)
