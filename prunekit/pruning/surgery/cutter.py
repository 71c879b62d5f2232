"""Cutting channels out of a model: tensors are sliced, and modules of which nothing is left are taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from prunekit.errors import PlanError
from prunekit.layers import OptionalModules
from prunekit.pruning.graph.axes import axis_length, conv_groups, is_channelwise, output_axis
from prunekit.pruning.plan import Group, Member

# Rounds in which what starves and what is given back have to agree.
ROUNDS = 100


Axis = tuple[str, int]  # a tensor's name and an axis of it


class Cutter:
    """Knows, for one model and its groups, what goes when channels go.

    Args:
        model: the dense model.
        groups: of that model.
        scores: for each group those of its channels: those given back are the best. Without, the first.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], scores: Mapping[str, np.ndarray] | None = None):
        self.model = model
        self.scores = scores or {}
        self.groups = groups
        self.lengths: dict[Axis, int] = {}
        self.blocks: dict[Axis, int] = {}
        self.members: dict[Axis, list[tuple[Group, Member]]] = {}
        modules = dict(model.named_modules())
        for group in groups:
            for member in group.members:
                key = member.tensor, member.axis
                if key not in self.lengths:
                    owner, _, name = member.tensor.rpartition(".")
                    module = modules[owner]
                    self.lengths[key] = axis_length(module, name, member.axis)
                    grouped = name == "weight" and getattr(module, "groups", 1) > 1
                    blocks = conv_groups(model, owner) if grouped else 1
                    if blocks > 1:
                        self.blocks[key] = blocks
                self.members.setdefault(key, []).append((group, member))

    def masks(self, dead: Mapping[str, Iterable[int]]) -> dict[Axis, np.ndarray]:
        """For each axis that loses something, which of its entries stay."""
        masks: dict[Axis, np.ndarray] = {}
        for group in self.groups:
            gone = indices(dead.get(group.id, ()))
            for member in group.members if len(gone) else ():
                key = member.tensor, member.axis
                if key not in masks:
                    masks[key] = np.ones(self.lengths[key], bool)
                masks[key][entries(member, gone)] = False
        return masks

    def complete(self, dead: Mapping[str, Iterable[int]]) -> tuple[dict[str, set[int]], list[str]]:
        """Add what cannot live without the dead: channels that nothing makes or nothing reads any more. And give back
        what a convolution with groups cannot be without: all of its groups have to stay of one size.

        Returns:
            all dead channels by group, and the modules of which nothing is left.

        Raises:
            PlanError: the two do not agree.
        """
        dead = {name: set(channels) for name, channels in dead.items()}
        for _ in range(ROUNDS):
            removed = self._starve(dead)
            uneven = self._level(dead)
            if uneven is None:
                return dead, sorted(removed)
        raise PlanError(
            f"the groups of {uneven} cannot be kept of one size, since nothing is left to make or read some of them; "
            "keep a channel of each (slim.ignored_layers)"
        )

    def _starve(self, dead: dict[str, set[int]]) -> set[str]:
        """Kill, in place, the groups that have lost all makers or all readers; the modules of which nothing is left."""
        while True:
            removed = self._emptied(dead)
            more = False
            for group in self.groups if removed else ():
                if group.reason is not None or len(dead.get(group.id, ())) == group.channels:
                    continue
                makers = [name for name in group.producers if not is_channelwise(self.model, name)]
                readers = [m.tensor.removesuffix(".weight") for m in group.readers]
                if (makers and removed.issuperset(makers)) or (readers and removed.issuperset(readers)):
                    dead[group.id] = set(range(group.channels))
                    more = True
            if not more:
                return removed

    def _emptied(self, dead: Mapping[str, set[int]]) -> set[str]:
        """The modules of which an axis has nothing left."""
        left: dict[Axis, int] = {}
        for group in self.groups:
            # Only what loses all channels of some group can be empty.
            if len(dead.get(group.id, ())) == group.channels:
                for member in group.members:
                    left.setdefault((member.tensor, member.axis), self.lengths[member.tensor, member.axis])
        for key in left:
            for group, member in self.members[key]:
                left[key] -= len(dead.get(group.id, ())) * member.stride
        return {name.rpartition(".")[0] for (name, _), count in left.items() if not count}

    def _level(self, dead: dict[str, set[int]]) -> str | None:
        """Give channels back, in place, until no group of a convolution has fewer than another; the convolution for
        which that was needed."""
        found = None
        for key, blocks in self.blocks.items():
            mask = self._mask(key, dead)
            if mask is None:
                continue
            counts = mask.reshape(blocks, -1).sum(1)
            wanted = max(int(counts.max()), self._least(key, dead)) if counts.any() else 0
            short = (wanted - counts).tolist()
            size = len(mask) // blocks
            for group, member in self.members[key] if any(short) else ():
                for channel in self._best_first(group, dead):
                    block = (member.offset + channel) // size
                    if short[block]:
                        short[block] -= 1
                        dead[group.id].discard(channel)
                        found = key[0].removesuffix(".weight")
        return found

    def _best_first(self, group: Group, dead: Mapping[str, set[int]]) -> list[int]:
        channels = sorted(dead.get(group.id, ()))
        scores = self.scores.get(group.id)
        return channels if scores is None else sorted(channels, key=lambda channel: -scores[channel])

    def _least(self, key: Axis, dead: Mapping[str, Iterable[int]]) -> int:
        """How many inputs each group of a convolution keeps at least: with one input and one output each, it would be a
        depthwise convolution, whose inputs are its outputs."""
        tensor, axis = key
        made = self._mask((tensor, 0), dead) if axis == 1 and (tensor, 0) in self.blocks else None
        return 2 if made is not None and made.reshape(self.blocks[key], -1).sum(1).max() == 1 else 1

    def _mask(self, key: Axis, dead: Mapping[str, Iterable[int]]) -> np.ndarray | None:
        """Which entries of this axis stay; None where all do."""
        mask = None
        for group, member in self.members[key]:
            gone = dead.get(group.id)
            if gone:
                if mask is None:
                    mask = np.ones(self.lengths[key], bool)
                mask[entries(member, indices(gone))] = False
        return mask

    def essential_modules(self, removed: Sequence[str]) -> list[str]:
        """Of the modules of which nothing is left, those that the model cannot do without."""
        return [
            name
            for name in removed
            if not isinstance(self.model.get_submodule(name.rpartition(".")[0]), OptionalModules)
        ]

    def cut(
        self,
        model: nn.Module,
        dead: Mapping[str, Iterable[int]],
        removed: Sequence[str],
        biases: Mapping[str, torch.Tensor] | None = None,
    ) -> list[str]:
        """Cut, in place; ``dead`` and ``removed`` as ``settle`` gives them.

        Args:
            model: this cutter's model, or a copy of it.
            biases: for convolutions that have none, one to add, of all their output channels as they were.

        Returns:
            the convolutions that got a bias.

        Raises:
            PlanError: a module would go that the model cannot do without.
        """
        vital = self.essential_modules(removed)
        if vital:
            raise PlanError(
                f"nothing would be left of {vital[0]}, and the model cannot do without it; keep a channel of it"
            )
        axes: dict[str, dict[tuple[str, int], np.ndarray]] = {}
        masks = self.masks(dead)
        for (tensor, axis), mask in masks.items():
            module, _, name = tensor.rpartition(".")
            axes.setdefault(module, {})[name, axis] = mask
        gone = set(removed)
        for name, cuts in axes.items():
            if name not in gone:
                _slice(model.get_submodule(name), cuts)
        for name in removed:
            remove(model, name)
        added = [name for name in biases or {} if name not in gone]
        for name in added:
            module = model.get_submodule(name)
            mask = masks.get((f"{name}.weight", output_axis(module)))
            module.bias = nn.Parameter(biases[name] if mask is None else biases[name][torch.from_numpy(mask)])
        return added


def indices(channels: Iterable[int]) -> np.ndarray:
    """Channels in ascending order, as an index."""
    return np.array(sorted(channels), np.int64)


def entries(member: Member, channels: np.ndarray) -> np.ndarray:
    """Where these channels stand along the member's axis."""
    first = member.offset + channels * member.stride
    return first if member.stride == 1 else (first[:, None] + np.arange(member.stride)).ravel()


def remove(model: nn.Module, name: str) -> None:
    """Take a module out of its OptionalModules, and that out of its own where it is empty then."""
    parent, _, key = name.rpartition(".")
    container = model.get_submodule(parent)
    del container[key]
    above, _, _ = parent.rpartition(".")
    if not len(container) and isinstance(model.get_submodule(above), OptionalModules):
        remove(model, parent)


def sliced(module: nn.Module, name: str, tensor: torch.Tensor, masks: Mapping[int, np.ndarray]) -> torch.Tensor:
    """A tensor of the shape of this tensor of the module's, with what the masks keep along each axis."""
    groups = getattr(module, "groups", 1)
    if name == "weight" and groups > 1 and not _depthwise(module):
        return _slice_groups(tensor, groups, masks.get(1), masks.get(0))
    for axis, mask in masks.items():
        tensor = tensor.index_select(axis, _kept(mask, tensor.device))
    return tensor


def _depthwise(module: nn.Module) -> bool:
    return module.groups == module.in_channels == module.out_channels


def _slice(module: nn.Module, masks: dict[tuple[str, int], np.ndarray]) -> None:
    depthwise = getattr(module, "groups", 1) > 1 and _depthwise(module)
    cuts: dict[str, dict[int, np.ndarray]] = {}
    for (name, axis), mask in masks.items():
        cuts.setdefault(name, {})[axis] = mask
    for name, axes in cuts.items():
        _replace(module, name, sliced(module, name, getattr(module, name).detach(), axes))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # One without affine parameters has statistics alone.
        module.num_features = len(getattr(module, next(iter(cuts))))
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        if depthwise:
            module.groups = len(module.weight)
        out = output_axis(module)
        module.out_channels, module.in_channels = module.weight.shape[out], module.weight.shape[1 - out] * module.groups


def _kept(mask: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(device)


def _slice_groups(weight: torch.Tensor, groups: int, read: np.ndarray | None, made: np.ndarray | None) -> torch.Tensor:
    """The weight of a convolution with groups, without some inputs and outputs; as many stay in each group."""
    parts = []
    for g, rows in enumerate(weight.chunk(groups)):
        if made is not None:
            rows = rows.index_select(0, _kept(made.reshape(groups, -1)[g], weight.device))
        if read is not None:
            rows = rows.index_select(1, _kept(read.reshape(groups, -1)[g], weight.device))
        parts.append(rows)
    return torch.cat(parts)


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    held = getattr(module, name)
    if isinstance(held, nn.Parameter):
        value = nn.Parameter(value, requires_grad=held.requires_grad)
    setattr(module, name, value)
