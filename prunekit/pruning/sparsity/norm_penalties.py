"""Penalties that need nothing but the weights: network slimming, and the group lasso."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from prunekit.config.registry import register_decay
from prunekit.errors import TrainingError
from prunekit.pruning.graph.parameter_slices import ParameterSlices
from prunekit.pruning.plan import Group
from prunekit.pruning.sparsity.decay import Decay, gates_to_decay


@register_decay("l1")
class L1Decay(Decay):
    """Network slimming (Liu et al., ICCV 2017, equation 1): λ · Σ|γ| over the gates.

    It acts through the loss, by the subgradient λ·sign(γ), as in the paper, and not by a proximal step. So a gate that
    has arrived swings about zero by as much as the optimiser's step: end with a small rate (a schedule that anneals),
    and read the gates with a threshold above the last one.

    Args:
        model: the model that will be trained, in the state in which its groups were found.
        groups: from ``find_groups``; the gates of those that can be cut are decayed.
        weight: λ.
        exclude: patterns (as in a shell) of norms to leave out, for example ["head.*"].

    Raises:
        TrainingError: no gate is left to decay.
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
        places, start = [], 0
        for gates, channels in zip(self._gates, slices.values(), strict=True):
            places += [start + channel for channel in sorted(channels)]
            start += len(gates)
        self._places = torch.tensor(places, device=self._gates[0].device)

    def penalty(self) -> Tensor:
        """λ · Σ|γ|, a scalar with gradient to the gates."""
        gates = torch.cat(self._gates)
        return self.weight * gates[self._places.to(gates.device)].abs().sum()


@register_decay("group_norm")
class GroupNormDecay(Decay):
    """Group lasso over all that a channel owns: λ · Σ √size · ‖w‖ over the channels.

    w are the channel's slices of all weights that would go with it (outputs of what makes it, inputs of what reads it,
    depthwise kernels, gates), size is how many numbers that is, ‖·‖ the L2 norm: the penalty of Yuan & Lin (J. R.
    Stat. Soc. B, 2006) over the groups of DepGraph (Fang et al., CVPR 2023; their group-level pruning decays squares
    instead, each channel's by a strength of its own).

    The gates are among the w, so that the criterion "gate" can read what came of it: where the rest of a channel has
    gone the pull on its gate is λ·√size, as that of "l1". As there the pull does not fade at zero, and the same holds
    for rate and threshold. A network that norms make indifferent to the scale of its weights loses all of them first;
    what is left in proportion, the criterion "magnitude" reads.

    Args:
        model: the model that will be trained, in the state in which its groups were found.
        groups: from ``find_groups``; the channels of those that can be cut are decayed.
        weight: λ.
        exclude: patterns (as in a shell) of modules; groups whose channels such a module makes or hands on are left
            out.

    Raises:
        TrainingError: no group is left to decay.
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
            raise TrainingError("no group to decay: every one is excluded or cannot be cut; see decay.options.exclude")
        self.norms = tuple(dict.fromkeys(gate.norm for group in chosen for gate in group.gates))
        self._slices = ParameterSlices(model, chosen)
        first = self._slices.tensors[0]
        self._scale = self._slices.sizes.sqrt().to(first.device, first.dtype)

    def penalty(self) -> Tensor:
        """λ · Σ √size · ‖w‖, a scalar with gradient to all weights of the groups; zero for a channel that is zero."""
        squares = self._slices.sum(torch.square)
        there = squares > 0
        # The root's slope is infinite at zero, and infinite times zero would be NaN.
        norms = torch.where(there, torch.where(there, squares, 1.0).sqrt(), 0.0)
        return self.weight * torch.dot(self._scale.to(norms), norms)
