"""What each channel owns: the slices of weights that would go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from prunekit.pruning.graph.axes import axis_length
from prunekit.pruning.plan import Group


class ParameterSlices:
    """The weights of convolutions, linear layers and norms, seen channel by channel.

    The channels of all groups stand in one row, each group's from ``start[group.id]`` on; so that a figure for each of
    them takes a few operations for each weight, and none for each channel. Biases and the slopes of PReLUs are left
    out: how large they are does not say how much a channel does.

    Args:
        model: the model that the groups are of.
        groups: those to look at.
        norms: whether the norms' weights count.

    Attributes:
        start: where each group's channels begin.
        total: how many channels there are.
        tensors: the weights, each once.
        members: for each channel, how many slices it owns, (total,).
        sizes: for each channel, how many numbers they hold, (total,).
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], norms: bool = True):
        self.start: dict[str, int] = {}
        self.total = 0
        for group in groups:
            self.start[group.id] = self.total
            self.total += group.channels
        self.tensors: list[nn.Parameter] = []
        self._axes: list[tuple[int, int, int, Tensor]] = []
        self.members = torch.zeros(self.total, dtype=torch.float64)
        self.sizes = torch.zeros(self.total, dtype=torch.float64)
        place: dict[str, int] = {}
        owners: dict[tuple[str, int], Tensor] = {}
        for group in groups:
            channels = torch.arange(group.channels) + self.start[group.id]
            for member in group.members:
                module, _, name = member.tensor.rpartition(".")
                module = model.get_submodule(module)
                weight = getattr(module, name)
                norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                if name != "weight" or isinstance(module, nn.PReLU) or (norm and not norms):
                    continue
                key = member.tensor, member.axis
                length = axis_length(module, name, member.axis)
                if member.tensor not in place:
                    place[member.tensor] = len(self.tensors)
                    self.tensors.append(weight)
                if key not in owners:
                    # Entries of no group in sight are counted on one channel too many.
                    owners[key] = torch.full((length,), self.total)
                    blocks = length // weight.shape[member.axis]
                    self._axes.append((place[member.tensor], member.axis, blocks, owners[key]))
                stop = member.offset + group.channels * member.stride
                owners[key][member.offset : stop] = channels.repeat_interleave(member.stride)
                self.members[channels] += 1
                self.sizes[channels] += member.stride * weight.numel() / length
        # Moved once: a penalty asks at every step.
        self._axes = [(*axis, owner.to(self.tensors[axis[0]].device)) for *axis, owner in self._axes]
        self._owners = torch.cat([owner for *_, owner in self._axes]) if self._axes else torch.zeros(0, dtype=int)

    def part(self, figures: Tensor, group: Group) -> Tensor:
        """Of a figure for each channel, those of one group."""
        return figures[self.start[group.id] :][: group.channels]

    def sums(self, values: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each axis of each weight: ``values`` of the weight summed over all other axes, (entries,), and the
        channel of each entry, (entries,); ``total`` where it belongs to none."""
        held: dict[int, Tensor] = {}
        for place, axis, blocks, owner in self._axes:
            if place not in held:
                held[place] = values(self.tensors[place])
            value = held[place]
            if blocks > 1:
                # The input axis of a convolution with groups: each block of outputs reads channels of its own.
                value = value.unflatten(0, (blocks, -1)).transpose(0, 1).flatten(1, 2)
            others = [d for d in range(value.dim()) if d != axis]
            yield value.sum(others) if others else value, owner

    def sum(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        """``values`` of all weights, summed over all that each channel owns, (total,)."""
        entries = torch.cat([part for part, _ in self.sums(values)])
        return entries.new_zeros(self.total + 1).index_add(0, self._owners.to(entries.device), entries)[: self.total]
