"""The weight slices that belong to each channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.pruning.graph.axes import axis_length
from prunekit.pruning.plan import Group


class ParameterSlices:
    """The weights of layers and norms and bare parameters, per channel.

    The channels of all groups are numbered consecutively, so that a statistic of each of them takes a few operations
    per weight instead of per channel. Biases and PReLU slopes are left out, because their size says little about the
    importance of a channel.

    Args:
        model: the model of the groups.
        groups: those to consider.
        norms: whether to include the weights of norms.

    Attributes:
        start: number of the first channel of each group.
        total: number of channels.
        tensors: the weights, each once.
        members: number of slices of each channel, (total,).
        sizes: number of weights in the slices of each channel, (total,).
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], norms: bool = True):
        self.start: dict[str, int] = {}
        self.total = 0
        for group in groups:
            self.start[group.id] = self.total
            self.total += group.channels
        self.tensors: list[nn.Parameter] = []
        self.members = torch.zeros(self.total, dtype=torch.float64)
        self.sizes = torch.zeros(self.total, dtype=torch.float64)
        tensor_index: dict[str, int] = {}
        owners: dict[tuple[str, int, int], Tensor] = {}
        axes: list[tuple[int, int, int, Tensor]] = []
        for group in groups:
            channels = torch.arange(group.channels) + self.start[group.id]
            for member in group.members:
                module_name, _, name = member.tensor.rpartition(".")
                module = model.get_submodule(module_name)
                weight = module._parameters.get(name)
                if weight is None or name.endswith("bias") or isinstance(module, nn.PReLU):
                    continue
                if weight.dim() == 1 and not norms:
                    continue
                entries = torch.from_numpy(member.entries(np.arange(group.channels)))
                length = axis_length(module, name, member.axis)
                if member.tensor not in tensor_index:
                    tensor_index[member.tensor] = len(self.tensors)
                    self.tensors.append(weight)
                # Where an entry belongs to a channel of several groups, such as a head, each has its own owners.
                layers = (key for layer in count() if (key := (member.tensor, member.axis, layer)) is not None)
                key = next(k for k in layers if k not in owners or bool((owners[k][entries] == self.total).all()))
                if key not in owners:
                    # Entries of other groups are attributed to an extra channel.
                    owners[key] = torch.full((length,), self.total)
                    axes.append(
                        (tensor_index[member.tensor], member.axis, length // weight.shape[member.axis], owners[key])
                    )
                owners[key][entries] = channels.repeat_interleave(member.times)
                self.members[channels] += 1
                self.sizes[channels] += member.times * weight.numel() / length
        # On the device once, because a penalty is computed at every step.
        self._axes = [(*axis, owner.to(self.tensors[axis[0]].device)) for *axis, owner in axes]
        self._owners = torch.cat([owner for *_, owner in self._axes]) if self._axes else torch.zeros(0, dtype=int)

    def part(self, values: Tensor, group: Group) -> Tensor:
        """Select the channels of a group from one value for each channel."""
        return values[self.start[group.id] :][: group.channels]

    def sums(self, fn: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each axis of each weight, ``fn`` of the weight summed over all other axes, (entries,), and the
        channel of each entry, (entries,), which is ``total`` for entries of other groups."""
        computed: dict[int, Tensor] = {}
        for index, axis, blocks, owner in self._axes:
            if index not in computed:
                computed[index] = fn(self.tensors[index])
            value = computed[index]
            if blocks > 1:
                # The input axis of a grouped convolution: each block of outputs reads its own channels.
                value = value.unflatten(0, (blocks, -1)).transpose(0, 1).flatten(1, 2)
            others = [d for d in range(value.dim()) if d != axis]
            yield value.sum(others) if others else value, owner

    def sum(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``fn`` of all weights, summed over the slices of each channel, (total,)."""
        entries = torch.cat([part for part, _ in self.sums(fn)])
        return entries.new_zeros(self.total + 1).index_add(0, self._owners.to(entries.device), entries)[: self.total]
