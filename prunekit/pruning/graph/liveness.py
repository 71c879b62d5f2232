"""What of a model is kept, whatever its channels score."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from prunekit.config.registry import nearest
from prunekit.errors import PlanError
from prunekit.layers import OptionalModules
from prunekit.pruning.graph.axes import axis_length
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.plan import Group


def kept_groups(model: nn.Module, groups: Sequence[Group], patterns: Sequence[str]) -> set[str]:
    """The ids of the groups that these patterns of module names keep whole.

    Raises:
        PlanError: a pattern that matches no module that makes channels or hands them on.
    """
    held: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for module in group.producers:
            parts = module.split(".")
            for depth in range(len(parts)):
                held[".".join(parts[: depth + 1])].add(group.id)
    found: set[str] = set()
    for pattern in patterns:
        matching = [name for name in held if fnmatchcase(name, pattern)]
        if not matching:
            near = nearest(pattern, list(held))
            hint = f"did you mean {near!r}?" if near else f"the first are {', '.join(list(held)[:5])}"
            raise PlanError(f"keep_layers: no module with channels matches {pattern!r}; {hint}")
        found.update(*(held[name] for name in matching))
    return found


def uncuttable(groups: Sequence[Group]) -> str | None:
    """A sentence on the groups that cannot be cut, or None where all can."""
    reasons = Counter(group.reason for group in groups if group.reason is not None)
    if not reasons:
        return None
    common = [f"{n} {reason}" for reason, n in reasons.most_common(3)]
    rest = sum(reasons.values()) - sum(n for _, n in reasons.most_common(3))
    return f"{number(sum(reasons.values()), 'group')} cannot be cut: {'; '.join(common)}" + (
        f"; {rest} other" if rest else ""
    )


def number(count: int, noun: str) -> str:
    """ "1 channel", "2 channels"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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


def layers_of(groups: Sequence[Group]) -> list[list[Group]]:
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
    layers = [layer for layer in layers_of(free) if all(may_go[group.id] for group in layer)]
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


def join_names(names: Sequence[str], most: int = 3) -> str:
    """ "a", "a and b", "a, b, c and 4 more"."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def check_finite(model: nn.Module) -> None:
    """Raise PlanError where a parameter or a buffer holds a number that is not finite: nothing can be read from it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        bad = tensor.detach()[~torch.isfinite(tensor.detach())]
        if bad.numel():
            raise PlanError(
                f"{name} is {float(bad.flatten()[0])} in {number(bad.numel(), 'place')} of {tensor.numel()}, so "
                "nothing can be read from the model; train with a lower rate, or load an earlier state"
            )
