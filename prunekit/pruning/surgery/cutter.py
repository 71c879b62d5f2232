"""Removal of channels from a model: tensors are sliced, and modules without inputs or outputs are removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from prunekit.errors import PlanError
from prunekit.layers import OptionalModules
from prunekit.pruning.graph.axes import axis_length, conv_groups, is_channelwise, output_axis
from prunekit.pruning.graph.slicing import channel_index, slice_model
from prunekit.pruning.plan import Group, Member
from prunekit.pruning.surgery.axis_lengths import AxisLengths, sparse_matrix

MAX_ROUNDS = 100

Axis = tuple[str, int]  # the name of a tensor and an axis of it


class Cutter:
    """Computes what is removed with channels, and removes it.

    Args:
        model: the dense model.
        groups: of that model.
        scores: for each group the scores of its channels: the best are given back first. By default the first are.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], scores: Mapping[str, np.ndarray] | None = None):
        self.model, self.groups, self.scores = model, groups, scores or {}
        self.lengths: dict[Axis, int] = {}
        self.blocks: dict[
            Axis, int
        ] = {}  # of grouped convolutions: the number of groups, which must stay of equal size
        self.members: dict[Axis, list[tuple[Group, Member]]] = defaultdict(list)  # what each axis carries
        modules = dict(model.named_modules())
        for group in groups:
            for member in group.members:
                key = member.tensor, member.axis
                if key not in self.lengths:
                    module, name = modules[member.module], member.tensor.rpartition(".")[2]
                    self.lengths[key] = axis_length(module, name, member.axis)
                    grouped = name == "weight" and getattr(module, "groups", 1) > 1
                    if grouped and (blocks := conv_groups(model, member.module)) > 1:
                        self.blocks[key] = blocks
                self.members[key].append((group, member))
        owners = [tensor.rpartition(".")[0] for tensor, _ in self.lengths]
        self.module_index = {name: index for index, name in enumerate(dict.fromkeys(owners))}
        self._prunable = np.array([group.reason is None for group in groups], bool)
        self._width = np.array([group.channels for group in groups], np.int64)
        self._module = np.array([self.module_index[owner] for owner in owners], np.int64)
        self._axis_lengths = AxisLengths(groups, self.lengths, self.members)
        # The modules that produce, and those that read, each group's channels.
        producers, readers = set(), set()
        channelwise: dict[str, bool] = {}
        for g, group in enumerate(groups):
            for name in group.producers:
                if name not in channelwise:
                    channelwise[name] = is_channelwise(model, name)
            made_by = [name for name in group.producers if not channelwise[name]]
            producers |= {(g, self.module_index[name], 1) for name in made_by}
            readers |= {(g, self.module_index[member.module], 1) for member in group.readers}
        needs = [sparse_matrix(sorted(pairs), (len(groups), len(self.module_index))) for pairs in (producers, readers)]
        self._needs = [(need, np.asarray(need.sum(1)).ravel()) for need in needs]

    def masks(self, dead: Mapping[str, Iterable[int]]) -> dict[Axis, np.ndarray]:
        """The mask of kept entries for each axis that loses some."""
        dead = {name: channel_index(channels) for name, channels in dead.items()}
        return {axis: mask for axis in self.members if (mask := self._mask(axis, dead)) is not None}

    def _mask(self, axis: Axis, dead: Mapping[str, Iterable[int]]) -> np.ndarray | None:
        mask = None
        for group, member in self.members[axis]:
            if len(channels := dead.get(group.id, ())):
                mask = np.ones(self.lengths[axis], bool) if mask is None else mask
                mask[member.entries(channel_index(channels))] = False
        return mask

    def complete(self, dead: Mapping[str, Iterable[int]]) -> tuple[dict[str, set[int]], list[str]]:
        """Return all dead channels of each group, and the modules to remove.

        Channels that nothing produces or nothing reads any more are added. Channels are given back where the groups of
        a convolution would differ in size.

        Raises:
            PlanError: no set of channels satisfies both.
        """
        dead = {name: set(channels) for name, channels in dead.items()}
        for _ in range(MAX_ROUNDS):
            removed = self._remove_orphans(dead)
            uneven = self._balance(dead)
            if uneven is None:
                return dead, sorted(removed)
        raise PlanError(
            f"the groups of {uneven} cannot be kept of equal size, since nothing is left to produce or read some of "
            "them; keep a channel of each (slim.ignored_layers)"
        )

    def _remove_orphans(self, dead: dict[str, set[int]]) -> set[str]:
        """Add, in place, the groups that have lost all producers or all readers; return the modules to remove."""
        before = np.array([len(dead.get(group.id, ())) for group in self.groups], np.int64)
        after, _, gone = self.complete_counts(before)
        for index in np.flatnonzero(after != before):
            dead[self.groups[index].id] = set(range(self.groups[index].channels))
        return {name for name, index in self.module_index.items() if gone[index]}

    def complete_counts(self, dead: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``complete`` without grouped convolutions, for numbers of channels.

        Returns:
            the numbers of dead channels, (groups,), the lengths that remain, in the order of ``lengths``, and which
            modules of ``module_index`` are gone.
        """
        while True:
            kept = self._axis_lengths.without(dead)
            gone = np.zeros(len(self.module_index), bool)
            gone[self._module[kept == 0]] = True
            lost = np.zeros(len(dead), bool)
            for need, count in self._needs:
                lost |= (count > 0) & (need @ gone.astype(np.int64) == count)
            lost &= self._prunable & (dead < self._width)
            if not lost.any():
                return dead, kept, gone
            dead = np.where(lost, self._width, dead)

    def _balance(self, dead: dict[str, set[int]]) -> str | None:
        """Give channels back, in place, until the groups of each convolution are of one size; return one changed."""
        unbalanced = None
        for axis, blocks in self.blocks.items():
            mask = self._mask(axis, dead)
            if mask is None:
                continue
            counts = mask.reshape(blocks, -1).sum(1)
            target = max(int(counts.max()), self._minimum(axis, dead)) if counts.any() else 0
            missing = (target - counts).tolist()
            size = len(mask) // blocks
            for group, member in self.members[axis] if any(missing) else ():
                scores = self.scores.get(group.id, np.zeros(group.channels))
                for channel in sorted(dead.get(group.id, ()), key=lambda k, scores=scores: (-scores[k], k)):
                    block = (member.offset + channel) // size
                    if missing[block]:
                        missing[block] -= 1
                        dead[group.id].discard(channel)
                        unbalanced = axis[0].removesuffix(".weight")
        return unbalanced

    def _minimum(self, axis: Axis, dead: Mapping[str, Iterable[int]]) -> int:
        """Return the least size of each group: with one input and one output each, a convolution would be depthwise."""
        tensor, number = axis
        outputs = self._mask((tensor, 0), dead) if number == 1 and (tensor, 0) in self.blocks else None
        return 2 if outputs is not None and outputs.reshape(self.blocks[axis], -1).sum(1).max() == 1 else 1

    def essential_modules(self, removed: Sequence[str]) -> list[str]:
        """Return those of the modules to remove that the model cannot do without."""
        parents = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in removed}
        return [name for name, parent in parents.items() if not isinstance(parent, OptionalModules)]

    def cut(
        self,
        model: nn.Module,
        dead: Mapping[str, Iterable[int]],
        removed: Sequence[str],
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> list[str]:
        """Remove channels and modules in place; return the convolutions that got a bias.

        Args:
            model: this cutter's model, or a copy of it.
            dead, removed: from ``complete``.
            biases: to add to convolutions without one, for all their output channels before the cut.

        Raises:
            PlanError: a module would be removed that the model cannot do without.
        """
        if essential := self.essential_modules(removed):
            raise PlanError(
                f"nothing would be left of {essential[0]}, and the model cannot do without it; keep a channel of it"
            )
        masks = self.masks(dead)
        slice_model(model, self.groups, dead, masks, removed)
        for name in removed:
            _remove_module(model, name)
        added = [name for name in biases or {} if name not in removed]
        for name in added:
            module = model.get_submodule(name)
            mask = masks.get((f"{name}.weight", output_axis(module)))
            module.bias = nn.Parameter(biases[name] if mask is None else biases[name][torch.from_numpy(mask)])
        return added


def _remove_module(model: nn.Module, name: str) -> None:
    """Remove a module from its container, and the container from its own where it is empty then."""
    parent, _, key = name.rpartition(".")
    container = model.get_submodule(parent)
    del container[key]
    if not len(container) and isinstance(model.get_submodule(parent.rpartition(".")[0]), OptionalModules):
        _remove_module(model, parent)
