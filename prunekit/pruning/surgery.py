"""Cutting channels out of a model: tensors are sliced, and modules of which nothing is left are taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from prunekit.errors import PlanError
from prunekit.layers import DepthwiseModules, OptionalModules
from prunekit.plan import Group, Member


class Cutter:
    """Knows, for one model and its groups, what goes when channels go.

    Args:
        model: the dense model.
        groups: of that model.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]):
        self.model = model
        self.groups = groups
        self.length = {}
        for group in groups:
            for member in group.members:
                module, _, name = member.tensor.rpartition(".")
                tensor = getattr(model.get_submodule(module), name)
                self.length[member.tensor, member.axis] = tensor.shape[member.axis]

    def masks(self, dead: Mapping[str, Iterable[int]]) -> dict[tuple[str, int], torch.Tensor]:
        """For each axis that loses something, which of its entries stay."""
        masks: dict[tuple[str, int], torch.Tensor] = {}
        for group in self.groups:
            gone = torch.tensor(sorted(dead.get(group.id, ())), dtype=torch.long)
            if not len(gone):
                continue
            for member in group.members:
                key = member.tensor, member.axis
                if key not in masks:
                    masks[key] = torch.ones(self.length[key], dtype=torch.bool)
                masks[key][entries(member, gone)] = False
        return masks

    def settle(self, dead: Mapping[str, Iterable[int]]) -> tuple[dict[str, set[int]], list[str]]:
        """Add what cannot live without the dead: channels that nothing makes or nothing reads any more.

        Returns:
            all dead channels by group, and the modules of which nothing is left.
        """
        dead = {name: set(channels) for name, channels in dead.items()}
        while True:
            removed = {name.rpartition(".")[0] for (name, _), mask in self.masks(dead).items() if not mask.any()}
            more = False
            for group in self.groups:
                if group.reason is not None or len(dead.get(group.id, ())) == group.channels:
                    continue
                makers = [name for name in group.producers if _makes(self.model, name)]
                readers = [m.tensor.removesuffix(".weight") for m in group.readers]
                if (makers and removed.issuperset(makers)) or (readers and removed.issuperset(readers)):
                    dead[group.id] = set(range(group.channels))
                    more = True
            if not more:
                return dead, sorted(removed)

    def vital(self, removed: Sequence[str]) -> list[str]:
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
        vital = self.vital(removed)
        if vital:
            raise PlanError(
                f"nothing would be left of {vital[0]}, and the model cannot do without it; keep a channel of it"
            )
        axes: dict[str, list[tuple[str, int, torch.Tensor]]] = {}
        masks = self.masks(dead)
        for (tensor, axis), mask in masks.items():
            module, _, name = tensor.rpartition(".")
            axes.setdefault(module, []).append((name, axis, mask))
        gone = set(removed)
        for name, cuts in axes.items():
            if name not in gone:
                _slice(model.get_submodule(name), cuts)
        for name in removed:
            remove(model, name)
        added = [name for name in biases or {} if name not in gone]
        for name in added:
            mask = masks.get((f"{name}.weight", 0))
            model.get_submodule(name).bias = nn.Parameter(biases[name] if mask is None else biases[name][mask])
        return added


def entries(member: Member, channels: torch.Tensor) -> torch.Tensor:
    """Where these channels stand along the member's axis."""
    first = member.offset + channels * member.stride
    return (first[:, None] + torch.arange(member.stride)).flatten()


def remove(model: nn.Module, name: str) -> None:
    """Take a module out of its OptionalModules, and that out of its own where it is empty then."""
    parent, _, key = name.rpartition(".")
    container = model.get_submodule(parent)
    del container[key]
    above, _, _ = parent.rpartition(".")
    if not len(container) and isinstance(model.get_submodule(above), OptionalModules):
        remove(model, parent)


def _makes(model: nn.Module, name: str) -> bool:
    """Whether this module makes its channels out of others (a norm or a depthwise convolution hands them on)."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() < 2:
        return False
    parent = model.get_submodule(name.rpartition(".")[0])
    return getattr(module, "groups", 1) == 1 and not isinstance(parent, DepthwiseModules)


def _slice(module: nn.Module, cuts: Sequence[tuple[str, int, torch.Tensor]]) -> None:
    for name, axis, mask in cuts:
        tensor = getattr(module, name)
        kept = tensor.detach().index_select(axis, mask.nonzero().flatten().to(tensor.device)).clone()
        if isinstance(tensor, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        setattr(module, name, kept)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        # One without affine parameters has statistics alone.
        module.num_features = len(kept)
        return
    weight = module.weight
    if isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        if module.groups > 1:
            module.groups = weight.shape[0]
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
