"""Which groups must keep channels because the model needs them, and which have lost all of theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from prunekit.layers import OptionalModules
from prunekit.pruning.graph.axes import axis_length
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.plan import Group


def removable(model: nn.Module, group: Group) -> bool:
    """Return whether a group may lose all channels: each of its modules is optional, or reads other groups too."""
    for member in group.members:
        if isinstance(model.get_submodule(member.module.rpartition(".")[0]), OptionalModules):
            continue
        length = axis_length(model.get_submodule(member.module), member.tensor.rpartition(".")[2], member.axis)
        if not member.reads or group.channels * member.times == length:
            return False
    return True


def group_by_layer(groups: Sequence[Group]) -> list[list[Group]]:
    """Collect the branches of each layer: groups whose last norms are in one container."""
    layers: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.gates:
            layers[group.gates[-1].norm.rpartition(".")[0]].append(group)
    return list(layers.values())


def essential_groups(model: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Return the sets of groups of which at least one channel must stay: all branches of a layer together, and each
    group that cannot be removed."""
    prunable = [group for group in groups if group.reason is None]
    may_go = {group.id: removable(model, group) for group in prunable}
    layers = [layer for layer in group_by_layer(prunable) if all(may_go[group.id] for group in layer)]
    return layers + [[group] for group in prunable if not may_go[group.id]]


def below_threshold(
    sets: Sequence[Sequence[Group]], threshold: float, scores: Callable[[Group], np.ndarray]
) -> dict[str, float]:
    """Return the sets of groups in which no score is above the threshold: their names, and the best score of each."""
    best = {" + ".join(g.id for g in groups): max(float(scores(g).max()) for g in groups) for groups in sets}
    return {name: score for name, score in best.items() if score <= threshold}


def dead_layers(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Return the essential groups of which every channel is dead."""
    return list(below_threshold(essential_groups(model, groups), 0.0, lambda group: gate_scores(model, group)))
