"""Gates → plan: which channels training has left alive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from prunekit.errors import PlanError
from prunekit.layers import OptionalModules, layer_of
from prunekit.plan import Group, Plan
from prunekit.pruning.life import scores
from prunekit.pruning.surgery import Cutter


def extract(model: nn.Module, groups: Sequence[Group], threshold: float = 1e-3, min_channels: int = 1) -> Plan:
    """Read the gates.

    A channel is dead where its score (see ``life``) is at most the threshold. Where a whole layer would die, its best
    channels stay: ``min_channels`` of each group whose modules the model cannot do without, and one in all of the
    branches of a layer.

    Args:
        model: the trained dense model.
        groups: of that model.
        threshold: of the effective gate, in units of the norm's output deviation.
        min_channels: kept in each group that survives.

    Raises:
        PlanError: a gate that is not finite, a threshold below 0 or ``min_channels`` below 1.
    """
    if not threshold >= 0:
        raise PlanError(f"threshold is at least 0, got {threshold}")
    if min_channels < 1:
        raise PlanError(f"min_channels is at least 1, got {min_channels}")
    values = {group.id: scores(model, group) for group in groups if group.reason is None}
    for group in groups:
        if group.reason is None and not np.isfinite(values[group.id]).all():
            raise PlanError(
                f"a gate of {group.id} is not finite, so nothing can be read from it; train with a lower rate"
            )
    alive = {name: value > threshold for name, value in values.items()}
    cuttable = [group for group in groups if group.reason is None]
    for group in cuttable:
        if alive[group.id].any() or not removable(model, group):
            _keep_best(alive[group.id], values[group.id], min_channels)
    layers = list(_layers(cuttable).values())
    for layer in layers:
        if not any(alive[group.id].any() for group in layer):
            best = max(layer, key=lambda group: values[group.id].max())
            _keep_best(alive[best.id], values[best.id], min_channels)
    cutter = Cutter(model, groups)
    while True:
        dead = {name: set(np.flatnonzero(~mask).tolist()) for name, mask in alive.items()}
        settled, _ = cutter.settle(dead)
        starved = [layer for layer in layers if all(len(settled[group.id]) == group.channels for group in layer)]
        if not starved:
            return make_plan(model, groups, settled)
        # Each layer had a living branch, but they did not meet: one layer kept its fine one, the next its coarse one.
        before = sum(int(mask.sum()) for mask in alive.values())
        for group in {group.id: group for layer in starved for group in layer}.values():
            _keep_best(alive[group.id], values[group.id], int(alive[group.id].sum()) + 1)
        if sum(int(mask.sum()) for mask in alive.values()) == before:
            raise PlanError(
                f"nothing reads {starved[0][0].id}, with all of its channels alive; the model has a gap there"
            )


def make_plan(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> Plan:
    """The plan that cuts these channels, and what cannot live without them."""
    dead, removed = Cutter(model, groups).settle(dead)
    kept = {
        group.id: [k for k in range(group.channels) if k not in dead.get(group.id, ())]
        for group in groups
        if group.reason is None
    }
    return Plan(groups=kept, removed=removed, splits=splits(model, groups, kept))


def dead_channels(groups: Sequence[Group], plan: Plan) -> dict[str, set[int]]:
    """What the plan cuts, by group."""
    return {group.id: set(range(group.channels)) - set(plan.kept(group)) for group in groups if group.reason is None}


def removable(model: nn.Module, group: Group) -> bool:
    """Whether the group may lose all of its channels: every module of it may be absent."""
    return all(
        isinstance(model.get_submodule(member.tensor.rpartition(".")[0].rpartition(".")[0]), OptionalModules)
        for member in group.members
    )


def splits(model: nn.Module, groups: Sequence[Group], kept: dict[str, list[int]]) -> dict[str, list[int]]:
    """For each multi-scale layer, the channels kept in each of its branches."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for group in groups:
        layer, branch = layer_of(model, group.members[0].tensor.rpartition(".")[0])
        if branch is not None and group.members[0].axis == 0:
            count = len(kept.get(group.id, range(group.channels)))
            found[layer][branch] = found[layer].get(branch, 0) + count
    return {layer: [counts.get(b, 0) for b in range(max(counts) + 1)] for layer, counts in found.items()}


def _layers(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups of each layer: those whose last norms stand in one container are its branches."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.gates:
            found[group.gates[-1].norm.rpartition(".")[0]].append(group)
    return found


def _keep_best(alive: np.ndarray, values: np.ndarray, count: int) -> None:
    """Make at least ``count`` channels live, the best ones; in place."""
    if alive.sum() < count:
        alive[np.argsort(-values, kind="stable")[:count]] = True
