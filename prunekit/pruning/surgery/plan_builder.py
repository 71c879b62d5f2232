"""Conversion between dead channels and plans."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from prunekit.layers import layer_of
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.cutter import Cutter


def make_plan(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> Plan:
    return plan_from_dead(model, groups, *Cutter(model, groups).complete(dead))


def plan_from_dead(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, set[int]], removed: list[str]) -> Plan:
    """Return the plan for the result of ``Cutter.complete``."""
    kept = {g.id: [k for k in range(g.channels) if k not in dead.get(g.id, ())] for g in groups if g.reason is None}
    return Plan(groups=kept, removed=removed, splits=_splits(model, groups, kept))


def dead_channels(groups: Sequence[Group], plan: Plan) -> dict[str, set[int]]:
    """Return the channels that a plan removes, by group."""
    return {group.id: set(range(group.channels)) - set(plan.kept(group)) for group in groups if group.reason is None}


def _splits(model: nn.Module, groups: Sequence[Group], kept: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the number of channels kept in each branch of each multi-scale layer, in the model's order."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for group in groups:
        # Layers that are summed share a group, and each of them may have several paths to it.
        producers = [name for name in group.producers if model.get_submodule(name).weight.dim() > 1]
        for layer, branch in dict.fromkeys(layer_of(model, name) for name in producers):
            if branch is not None:
                counts[layer][branch] += len(kept.get(group.id, range(group.channels)))
    layers = [name for name, _ in model.named_modules() if name in counts]
    return {layer: [counts[layer][branch] for branch in range(max(counts[layer]) + 1)] for layer in layers}
