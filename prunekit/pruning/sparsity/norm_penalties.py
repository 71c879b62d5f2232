"""Penalties on weights alone: network slimming and group lasso."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from prunekit.config.registry import register_decay
from prunekit.errors import TrainingError
from prunekit.pruning.graph.parameter_slices import ParameterSlices
from prunekit.pruning.plan import Group
from prunekit.pruning.sparsity.dynamic_decay import Decay, gates_to_decay


@register_decay("l1")
class L1Decay(Decay):
    """Network slimming (Liu et al., ICCV 2017, equation 1): λ · Σ|γ| over the gates.

    It acts by the subgradient λ·sign(γ), so gates oscillate around zero by the optimizer's step size: end with a small
    learning rate, and use a threshold above the last step size. Args and errors as for :class:`DynamicWeightDecay`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        weight: float = 1e-4,
        exclude: list[str] | tuple[str, ...] = (),
    ):
        self.weight = weight
        slices: dict[str, set[int]] = {}
        for gate in gates_to_decay(groups, exclude):
            slices.setdefault(gate.norm, set()).update(range(*gate.slice))
        self.norms = tuple(slices)
        self._gates = [model.get_submodule(name).weight for name in self.norms]
        indices, start = [], 0
        for gates, channels in zip(self._gates, slices.values(), strict=True):
            indices += [start + channel for channel in sorted(channels)]
            start += len(gates)
        self._indices = torch.tensor(indices, device=self._gates[0].device)

    def penalty(self) -> Tensor:
        gates = torch.cat(self._gates)
        return self.weight * gates[self._indices.to(gates.device)].abs().sum()


@register_decay("group_norm")
class GroupNormDecay(Decay):
    """Group lasso over all weights of a channel: λ · Σ √size · ‖w‖ over the channels (Yuan & Lin, J. R. Stat. Soc. B,
    2006; groups as in DepGraph, Fang et al., CVPR 2023, which decays squares instead).

    w are the slices of all weights that are pruned with the channel (outputs of its producers, inputs of its readers,
    depthwise kernels, gates), size is their number, ‖·‖ the L2 norm. Learning rate and threshold as for "l1". Where
    norms make a network invariant to the scale of its weights, select with the importance "magnitude". Args and errors
    as for :class:`DynamicWeightDecay`; ``exclude`` names modules, and leaves out the groups whose channels they produce
    or pass on.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        weight: float = 1e-4,
        exclude: list[str] | tuple[str, ...] = (),
    ):
        self.weight = weight
        chosen = [
            group
            for group in groups
            if group.reason is None
            and not any(fnmatchcase(module, pattern) for module in group.producers for pattern in exclude)
        ]
        if not chosen:
            raise TrainingError(
                "no group to decay: every one is excluded or cannot be pruned; see decay.options.exclude"
            )
        self.norms = tuple(dict.fromkeys(gate.norm for group in chosen for gate in group.gates))
        self._slices = ParameterSlices(model, chosen)
        first = self._slices.tensors[0]
        self._scale = self._slices.sizes.sqrt().to(first.device, first.dtype)

    def penalty(self) -> Tensor:
        squares = self._slices.sum(torch.square)
        positive = squares > 0
        # The gradient of the root is infinite at zero, and infinity times zero would be NaN.
        norms = torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
        return self.weight * torch.dot(self._scale.to(norms), norms)
