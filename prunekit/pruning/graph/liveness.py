"""What of a model is kept, whatever its channels score."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from prunekit.layers import OptionalModules
from prunekit.pruning.graph.axes import axis_length
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.plan import Group
from prunekit.utils.text import plural


def describe_unprunable(groups: Sequence[Group]) -> str | None:
    """A sentence on the groups that cannot be cut, or None where all can."""
    reasons = Counter(group.reason for group in groups if group.reason is not None)
    if not reasons:
        return None
    common = [f"{n} {reason}" for reason, n in reasons.most_common(3)]
    rest = sum(reasons.values()) - sum(n for _, n in reasons.most_common(3))
    return f"{plural(sum(reasons.values()), 'group')} cannot be cut: {'; '.join(common)}" + (
        f"; {rest} other" if rest else ""
    )


def removable(model: nn.Module, group: Group) -> bool:
    """Whether the group may lose all of its channels: every module of it may be absent, or has others to read."""
    for member in group.members:
        module, _, name = member.tensor.rpartition(".")
        if isinstance(model.get_submodule(module.rpartition(".")[0]), OptionalModules):
            continue
        length = axis_length(model.get_submodule(module), name, member.axis)
        if not member.reads or group.channels * member.stride == length:
            return False
    return True


def group_by_layer(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each layer: those whose last norms stand in one container are its branches."""
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.gates:
            found[group.gates[-1].norm.rpartition(".")[0]].append(group)
    return list(found.values())


def essential_groups(model: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """The sets of groups of which a channel each must live: all branches of a layer together, and each group that
    cannot be taken out."""
    free = [group for group in groups if group.reason is None]
    may_go = {group.id: removable(model, group) for group in free}
    layers = [layer for layer in group_by_layer(free) if all(may_go[group.id] for group in layer)]
    return layers + [[group] for group in free if not may_go[group.id]]


def below_threshold(
    sets: Sequence[Sequence[Group]], threshold: float, values: Callable[[Group], np.ndarray]
) -> dict[str, float]:
    """Those of these sets of groups of which no channel has a score above the threshold: their names, and the best
    score in each.

    Args:
        sets: from ``vital``.
        threshold: of the score.
        values: the scores of a group, (channels,).
    """
    best = {" + ".join(group.id for group in one): max(float(values(g).max()) for g in one) for one in sets}
    return {name: score for name, score in best.items() if score <= threshold}


def dead_layers(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """What a model cannot do without and whose gates are all zero."""
    return list(below_threshold(essential_groups(model, groups), 0.0, lambda group: gate_scores(model, group)))
