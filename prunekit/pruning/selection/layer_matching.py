"""Layers named by the user, as modules or as patterns of names → groups of channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.plan import Group
from prunekit.utils.text import closest_match

Layer = str | nn.Module


def match_layers(
    model: nn.Module, groups: Sequence[Group], layers: Sequence[Layer], argument: str = "ignored_layers"
) -> set[str]:
    """Return the ids of the groups whose channels the given layers, or modules inside them, produce or pass on.

    Args:
        layers: modules of the model, names of modules, or patterns of names as in a shell.
        argument: the name of the argument that gave them, for messages.

    Raises:
        PlanError: a layer that is not in the model or has no channels, or no list.
    """
    if isinstance(layers, Layer):
        raise PlanError(f"{argument} is a list of modules or patterns; write [{_describe(layers)}]")
    names = {module: name for name, module in model.named_modules()}
    group_ids: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for module_name in group.producers:
            parts = module_name.split(".")
            for depth in range(len(parts)):
                group_ids[".".join(parts[: depth + 1])].add(group.id)
    matched: set[str] = set()
    for layer in layers:
        if not isinstance(layer, str):
            matched |= _match_module(layer, names, group_ids, argument)
        elif matching := [name for name in group_ids if fnmatchcase(name, layer)]:
            matched.update(*(group_ids[name] for name in matching))
        else:
            close = closest_match(layer, list(group_ids))
            hint = f"did you mean {close!r}?" if close else f"the first are {', '.join(list(group_ids)[:5])}"
            raise PlanError(f"{argument}: no module with channels matches {layer!r}; {hint}")
    return matched


def _match_module(
    module: nn.Module, names: dict[nn.Module, str], group_ids: dict[str, set[str]], argument: str
) -> set[str]:
    name = names.get(module)
    if name is None:
        raise PlanError(
            f"{argument}: {_describe(module)} is not a module of this model; pass one of its modules or a name, "
            "such as 'layer1.0.conv1'"
        )
    if name == "":
        return set().union(*group_ids.values())
    if name not in group_ids:
        raise PlanError(f"{argument}: {name} ({_describe(module)}) has no channels; pass the layer that produces them")
    return group_ids[name]


def _describe(layer: Layer) -> str:
    return repr(layer) if isinstance(layer, str) else type(layer).__name__
