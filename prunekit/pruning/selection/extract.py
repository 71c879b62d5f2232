"""Scores → plan: which channels training has left alive, and which of them stay."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from prunekit.errors import PlanError, PrunekitWarning
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.selection.layers import Layer
from prunekit.pruning.selection.selector import Scope, Scores, Selection, Selector
from prunekit.pruning.surgery.make_plan import plan_from_dead


def extract(
    model: nn.Module,
    groups: Sequence[Group],
    threshold: float | None = None,
    min_channels: int = 1,
    *,
    scores: Scores | None = None,
    share: float | None = None,
    scope: Scope = "global",
    round_to: int = 1,
    ignored_layers: Sequence[Layer] = (),
) -> Plan:
    """Choose the channels that stay.

    Without a share, a channel is dead where its score is at most the threshold. Where a whole layer would die, its
    best channels stay: ``min_channels`` of each group whose modules the model cannot do without, and one in all of the
    branches of a layer. What is not as it was asked for stands in the plan's ``notes``, and a
    :class:`PrunekitWarning` is given for it.

    Args:
        model: the trained dense model.
        groups: of that model.
        threshold: of the score. That of the effective gate (see ``life``) is in units of the norm's output deviation;
            1e-3 where neither scores nor a share are given.
        min_channels: kept in each group that survives.
        scores: for each group its channels' scores, as a criterion gives them; by default the effective gates.
        share: instead of a threshold: the share of the channels that can be cut which goes, 0 to 1, the least first.
            Of equal ones no more go than asked, spread evenly over the groups.
        scope: whether the share is of all channels together ("global") or of each group ("layer").
        round_to: counts of kept channels are rounded up to its multiples.
        ignored_layers: modules of the model, or patterns (as in a shell) of their names, whose channels are all kept, with
            all modules inside them.

    Raises:
        PlanError: a score that is not finite, a number out of range or missing, or a pattern that matches no module.
    """
    if scores is not None and threshold is None and share is None:
        raise PlanError("scores of a criterion have units of their own; give a share, such as 0.3, or a threshold")
    chooser = Selector(
        model,
        groups,
        gate(model, groups) if scores is None else scores,
        scope=scope,
        min_channels=min_channels,
        round_to=round_to,
        ignored_layers=ignored_layers,
    )
    choice = chooser.cut(threshold=1e-3 if threshold is None and share is None else threshold, share=share)
    for note in choice.urgent:
        warnings.warn(note, PrunekitWarning, stacklevel=2)
    return plan_of_choice(model, groups, choice)


def plan_of_choice(model: nn.Module, groups: Sequence[Group], choice: Selection) -> Plan:
    """The plan that cuts what was chosen, with its notes."""
    plan = plan_from_dead(model, groups, choice.dead, choice.removed)
    plan.notes = list(choice.notes)
    return plan
