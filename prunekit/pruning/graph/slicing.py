"""Slicing of a model's tensors, and the sizes that its modules keep."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.pruning.graph.attributes import owner_of
from prunekit.pruning.graph.axes import CONVS, TRANSPOSED, axis_length, is_depthwise, output_axis
from prunekit.pruning.plan import Attribute, Group

Axis = tuple[str, int]  # the name of a tensor and an axis of it


def slice_model(
    model: nn.Module,
    groups: Sequence[Group],
    dead: Mapping[str, Iterable[int]],
    masks: Mapping[Axis, np.ndarray] | None = None,
    removed: Sequence[str] = (),
) -> None:
    """Remove channels in place.

    Args:
        groups: of the model, or some of them.
        dead: for the ids of groups the channels to remove.
        masks: of the entries that are kept, if already known.
        removed: modules that are left as they are.
    """
    modules = dict(model.named_modules())
    masks = _masks(modules, groups, dead) if masks is None else masks
    by_module: dict[str, dict[str, dict[int, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for (tensor, axis), mask in masks.items():
        module, _, name = tensor.rpartition(".")
        by_module[module][name][axis] = mask
    owners = _owners_of_tensors(model)
    for name, cuts in by_module.items():
        if name not in removed:
            _slice_module(modules[name], cuts, owners)
    _cut_statistics(modules, groups, dead, removed)
    for group in groups:
        changed = set()  # modules may share a configuration
        for attribute in group.attributes if dead.get(group.id) else ():
            if attribute.module not in removed:
                kept = group.channels - len(channel_index(dead[group.id]))
                module = modules[attribute.module]
                owner, key = owner_of(module, attribute.name)
                if (id(owner), key, attribute.index) not in changed:
                    _set_attribute(owner, key, attribute, kept, group.channels)
                    changed.add((id(owner), key, attribute.index))
                if isinstance(module, nn.MultiheadAttention):
                    module.head_dim = module.embed_dim // module.num_heads


def _set_attribute(owner: Any, key: str, attribute: Attribute, kept: int, channels: int) -> None:
    value = getattr(owner, key)
    if attribute.index is None:
        setattr(owner, key, attribute.after(kept, channels, value))
    else:
        parts = list(value)
        parts[attribute.index] = attribute.after(kept, channels, parts[attribute.index])
        setattr(owner, key, type(value)(parts))


def _masks(
    modules: Mapping[str, nn.Module], groups: Sequence[Group], dead: Mapping[str, Iterable[int]]
) -> dict[Axis, np.ndarray]:
    masks: dict[Axis, np.ndarray] = {}
    for group in groups:
        for member in group.members if dead.get(group.id) else ():
            axis = member.tensor, member.axis
            if axis not in masks:
                module, name = modules[member.module], member.tensor.rpartition(".")[2]
                masks[axis] = np.ones(axis_length(module, name, member.axis), bool)
            masks[axis][member.entries(channel_index(dead[group.id]))] = False
    return masks


def channel_index(channels: Iterable[int] | np.ndarray) -> np.ndarray:
    return channels if isinstance(channels, np.ndarray) else np.array(sorted(channels), np.int64)


def _cut_statistics(
    modules: Mapping[str, nn.Module], groups: Sequence[Group], dead: Mapping[str, Iterable[int]], removed: Sequence[str]
) -> None:
    """Give norms the length of what they normalize over."""
    gone: dict[tuple[str, int, int], list[np.ndarray]] = defaultdict(list)
    for group in groups:
        for statistic in group.statistics if dead.get(group.id) else ():
            if statistic.module in removed or statistic.call:
                continue
            module, channels = modules[statistic.module], channel_index(dead[group.id])
            if isinstance(module, nn.GroupNorm) and statistic.operation == "group_norm":
                gone[statistic.module, statistic.axis, 1].append(statistic.entries(channels))
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and statistic.operation.endswith("_norm"):
                gone[statistic.module, statistic.axis, 0].append(statistic.entries(channels))
    axes = Counter((name, kind) for name, _, kind in gone)
    for (name, _, kind), entries in gone.items():
        module, lost = modules[name], len(np.unique(np.concatenate(entries)))
        if kind:
            module.num_channels -= lost
        elif axes[name, kind] == 1:
            *others, last = module.normalized_shape
            module.normalized_shape = (*others, last - lost)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)


def slice_tensor(module: nn.Module, name: str, tensor: torch.Tensor, masks: Mapping[int, np.ndarray]) -> torch.Tensor:
    """Return the kept entries of a tensor that has the shape of the module's tensor ``name``; a mask for each axis."""
    if not masks:
        return tensor
    if tensor.is_meta:
        sides = list(tensor.shape)
        for axis, mask in masks.items():
            sides[axis] = int(mask.sum()) * sides[axis] // len(mask)
        return tensor.new_empty(sides)
    groups = getattr(module, "groups", 1) if isinstance(module, CONVS + TRANSPOSED) else 1
    # Each group of a convolution reads its own channels, and keeps as many as the others.
    blocks = groups if name == "weight" and groups > 1 and not is_depthwise(module) else 1
    parts = list(tensor.chunk(blocks))
    for axis, mask in masks.items():
        kept = mask.reshape(blocks, -1)
        parts = [_select(part, axis, kept[block]) for block, part in enumerate(parts)]
    # In the memory layout of the tensor, such as channels last.
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
    back = [order.index(axis) for axis in range(tensor.dim())]
    whole = parts[0] if blocks == 1 else torch.cat(parts)
    return whole.permute(order).contiguous().permute(back)


def _select(tensor: torch.Tensor, axis: int, mask: np.ndarray) -> torch.Tensor:
    return tensor.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))


def _owners_of_tensors(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that have each parameter and buffer, by its id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            owners[id(tensor)].append((module, name))
    return owners


def _slice_module(
    module: nn.Module,
    masks: Mapping[str, Mapping[int, np.ndarray]],
    owners: Mapping[int, list[tuple[nn.Module, str]]],
) -> None:
    depthwise = isinstance(module, CONVS) and is_depthwise(module)
    changed = {module: None}
    for name, axes in masks.items():
        tensor = getattr(module, name)
        kept = slice_tensor(module, name, tensor.detach(), axes)
        new = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
        for owner, key in owners[id(tensor)]:
            setattr(owner, key, new)
            changed[owner] = None
    for owner in changed:
        _update_sizes(owner, depthwise)


def _update_sizes(module: nn.Module, depthwise: bool) -> None:
    """Give the attributes of a layer the sizes of its weight."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        # One without affine parameters has statistics alone.
        tensors = (weight, module.running_mean, module.bias)
        module.num_features = next(len(tensor) for tensor in tensors if tensor is not None)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
        module.head_dim = module.embed_dim // module.num_heads
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, CONVS + TRANSPOSED):
        if depthwise:
            module.groups = len(weight) // (module.out_channels // module.in_channels)
        out = output_axis(module)
        module.out_channels, module.in_channels = weight.shape[out], weight.shape[1 - out] * module.groups
