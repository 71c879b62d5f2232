"""Dead channels → a plan, and a plan → dead channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from prunekit.layers import layer_of
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.cutter import Cutter


def make_plan(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> Plan:
    """The plan that cuts these channels, and what cannot live without them."""
    return plan_from_dead(model, groups, *Cutter(model, groups).complete(dead))


def plan_from_dead(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, set[int]], removed: list[str]) -> Plan:
    """The plan that cuts what ``Cutter.complete`` has found."""
    kept = {
        group.id: [k for k in range(group.channels) if k not in dead.get(group.id, ())]
        for group in groups
        if group.reason is None
    }
    return Plan(groups=kept, removed=removed, splits=splits(model, groups, kept))


def dead_channels(groups: Sequence[Group], plan: Plan) -> dict[str, set[int]]:
    """What the plan cuts, by group."""
    return {group.id: set(range(group.channels)) - set(plan.kept(group)) for group in groups if group.reason is None}


def splits(model: nn.Module, groups: Sequence[Group], kept: dict[str, list[int]]) -> dict[str, list[int]]:
    """For each multi-scale layer, the channels kept in each of its branches."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for group in groups:
        count = len(kept.get(group.id, range(group.channels)))
        # Layers whose outputs meet in a sum have one group together, and each of them has several paths to it.
        makers = [name for name in group.producers if model.get_submodule(name).weight.dim() > 1]
        for layer, branch in dict.fromkeys(layer_of(model, name) for name in makers):
            if branch is not None:
                found[layer][branch] = found[layer].get(branch, 0) + count
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    return {
        layer: [found[layer].get(b, 0) for b in range(max(found[layer]) + 1)]
        for layer in sorted(found, key=order.__getitem__)
    }
