"""A dense model that computes statistics, such as the mean of a LayerNorm, over the channels that are left."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.operations.keys import OperationKeys, operation_name, without_fast_path
from prunekit.pruning.graph.rules.base import find_rule
from prunekit.pruning.plan import Group

Key = tuple[str, str, int]  # module, operation, number of the call
Dead = dict[Key, dict[int, list[np.ndarray]]]  # axis → entries that are pruned


def mask_statistics(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a model whose statistics leave out dead channels; the model itself where it computes none over them."""
    found: Dead = defaultdict(lambda: defaultdict(list))
    for group in groups:
        channels = np.array(sorted(dead.get(group.id, ())), np.int64)
        for statistic in group.statistics if len(channels) else ():
            key = statistic.module, statistic.operation, statistic.call
            found[key][statistic.axis].append(statistic.entries(channels))
    return MaskedStatistics(model, {key: dict(axes) for key, axes in found.items()}) if found else model


class MaskedStatistics(nn.Module):
    """A model that leaves entries out of what some of its operations compute; norms and softmaxes return zero there."""

    def __init__(self, model: nn.Module, dead: Dead):
        super().__init__()
        self.model, self.dead = model, dead

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = _MaskingMode(self.model, self.dead)
        # As in the trace: otherwise operations are decomposed before the mode sees them.
        with torch.inference_mode(), without_fast_path(), mode.hooks(), mode:
            return self.model(*args, **kwargs)


class _MaskingMode(TorchDispatchMode, OperationKeys):
    def __init__(self, model: nn.Module, dead: Dead):
        TorchDispatchMode.__init__(self)
        OperationKeys.__init__(self, model)
        self.dead = dead
        self.operations = {operation for _, operation, _ in dead}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, operation_name(func)
        if find_rule(name, func) is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        axes = self.dead.get(self.next(name)) if name in self.operations else None
        if axes is None:
            return func(*args, **kwargs)
        return _masked(name, func, args, kwargs, axes)


def _masked(name: str, func: Any, args: Any, kwargs: Any, axes: Mapping[int, Sequence[np.ndarray]]) -> Any:
    value: Tensor = args[0]
    kept = {axis: _kept(value.shape[axis], entries) for axis, entries in axes.items()}
    if name == "scaled_dot_product_attention":
        (length,) = map(len, kept.values())
        return func(*args, **kwargs, scale=1 / math.sqrt(length))
    part = value
    for axis, index in kept.items():
        part = part.index_select(axis, index)
    if name == "mean":
        return func(part, *args[1:], **kwargs)
    if name.endswith(("batch_norm", "instance_norm", "softmax")):
        result = func(part, *args[1:], **kwargs)
    elif name == "group_norm":
        (index,) = kept.values()
        tensors = [None if tensor is None else tensor[index] for tensor in args[2:4]]
        result = func(part, args[1], *tensors, *args[4:], **kwargs)
    else:
        first = value.dim() - len(args[1])
        tensors = list(args[2:4])
        for axis, index in kept.items():
            tensors = [t if not isinstance(t, Tensor) else t.index_select(axis - first, index) for t in tensors]
        result = func(part, part.shape[first:], *tensors, *args[4:], **kwargs)
    for axis, index in kept.items():
        shape = [*result.shape]
        shape[axis] = value.shape[axis]
        result = result.new_zeros(shape).index_copy(axis, index, result)
    return result


def _kept(length: int, dead: Sequence[np.ndarray]) -> Tensor:
    mask = np.ones(length, bool)
    mask[np.concatenate(dead)] = False
    return torch.from_numpy(np.flatnonzero(mask))
