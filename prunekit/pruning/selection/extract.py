"""Scores → a plan: which channels remain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from prunekit.errors import PlanError, PrunekitWarning
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.selection.layer_matching import Layer
from prunekit.pruning.selection.selector import Scope, Scores, Selection, Selector
from prunekit.pruning.surgery.plan_builder import plan_from_dead
from prunekit.utils.compiled import unwrap


def extract(
    model: nn.Module,
    groups: Sequence[Group],
    threshold: float | None = None,
    min_channels: int = 1,
    *,
    scores: Scores | None = None,
    pruning_ratio: float | None = None,
    scope: Scope = "global",
    round_to: int = 1,
    ignored_layers: Sequence[Layer] = (),
) -> Plan:
    """Select the channels to keep.

    Without a ratio, a channel is pruned where its score is at most the threshold. A layer is never pruned completely:
    ``min_channels`` of each group that the model cannot do without are kept, and one channel in all branches of a
    layer. Where the plan differs from the request, ``plan.notes`` says so and a :class:`PrunekitWarning` is issued.

    Args:
        model: the trained dense model.
        groups: its groups.
        threshold: of the score. The default scores, effective gates, are in units of the standard deviation of the
            norm's output; their default threshold is 1e-3.
        min_channels: number of channels to keep in each group that remains.
        scores: for each group its channels' scores, (channels,); by default the effective gates (``importance.gate``).
        pruning_ratio: instead of a threshold, the share of the channels to prune, 0 to 1, lowest scores first.
        scope: whether the ratio is of all channels together ("global"), of those in groups of the same structure
            ("isomorphic") or of each group ("layer").
        round_to: kept channels are rounded up to a multiple of this.
        ignored_layers: modules, or patterns (as in a shell) of their names, of which all channels are kept.

    Raises:
        PlanError: a score that is not finite, a number out of range or missing, or a pattern that matches no module.
    """
    model = unwrap(model)
    if scores is not None and threshold is None and pruning_ratio is None:
        raise PlanError("these scores have units of their own; give a pruning_ratio, such as 0.3, or a threshold")
    if threshold is None and pruning_ratio is None:
        threshold = 1e-3
    limits: dict[str, Any] = {"min_channels": min_channels, "round_to": round_to, "ignored_layers": ignored_layers}
    selector = Selector(model, groups, gate(model, groups) if scores is None else scores, scope=scope, **limits)
    selection = selector.select(threshold=threshold, pruning_ratio=pruning_ratio)
    for note in selection.warnings:
        warnings.warn(note, PrunekitWarning, stacklevel=2)
    return plan_from_selection(model, groups, selection)


def plan_from_selection(model: nn.Module, groups: Sequence[Group], selection: Selection) -> Plan:
    """Return the plan that prunes the selected channels, with the notes of the selection."""
    plan = plan_from_dead(model, groups, selection.dead, selection.removed)
    plan.notes = list(selection.notes)
    return plan
