"""Decays of the gates during sparse training; dynamic weight decay (Gao et al., ECCV 2020, section 3.4)."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.registry import register_decay
from prunekit.errors import TrainingError
from prunekit.pruning.plan import Gate, Group
from prunekit.utils.compiled import unwrap


class Decay(ABC):
    """Interface of a decay: a context manager around the forward passes, and their penalty."""

    weight: float = 0.0  # λ
    norms: Sequence[str] = ()  # those whose gates are decayed

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return the penalty for the forward passes since the last call, a scalar with gradients."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def gates_to_decay(groups: Sequence[Group], exclude: Sequence[str]) -> list[Gate]:
    """Return the gates of the groups that can be pruned, without norms that match a pattern (as in a shell)."""
    gates = [gate for group in groups if group.reason is None for gate in group.gates]
    if not gates and any(group.reason is None for group in groups):
        raise TrainingError("no gate to decay: no channel passes a norm with a gate; use the decay group_norm, or none")
    gates = [gate for gate in gates if not any(fnmatchcase(gate.norm, pattern) for pattern in exclude)]
    if not gates:
        raise TrainingError("no gate to decay: every group is excluded or cannot be pruned; see decay.options.exclude")
    return gates


@register_decay("none")
class NoDecay(Decay):
    """No penalty on the gates."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], weight: float = 0.0):
        self._parameter = next(model.parameters(), None)

    def penalty(self) -> Tensor:
        # On the device of the loss: an accelerator waits for tensors from the CPU.
        return torch.zeros((), device=None if self._parameter is None else self._parameter.device)


@register_decay("dynamic")
class DynamicWeightDecay(Decay):
    """Decay of the gates in proportion to their channels' responses (Gao et al., ECCV 2020).

    The penalty is λ · ½ · Σ w · mean over images(|spatial mean of y|) · γ² over the gates γ, where y is the response
    after the norm and its activation, without gradient.

    Args:
        model: the model to train, as it was when its groups were found.
        groups: from ``find_groups``; those that can be pruned are decayed.
        weight: λ.
        branch_weights: "none" for w = 1, or "flops" for w = the side length of the gate's feature map (twice for a
            branch twice as fine, half for a stage half as large), relative to the mean over all gates.
        exclude: patterns (as in a shell) of norms to leave out, for example ["head.*"].

    Raises:
        TrainingError: no gate is left to decay.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        weight: float = 1e-2,
        branch_weights: Literal["none", "flops"] = "none",
        exclude: list[str] | tuple[str, ...] = (),
    ):
        self.weight, self.branch_weights = weight, branch_weights
        activations = {gate.norm: gate.activation for gate in gates_to_decay(groups, exclude)}
        self.norms = tuple(activations)
        self._gates = [model.get_submodule(name).weight for name in self.norms]
        self._responses = [_Responses(model, name, activations[name]) for name in self.norms]
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [responses.register_hook() for responses in self._responses]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for responses in self._responses:
            responses.clear()
        self._hooks = []

    def penalty(self) -> Tensor:
        """Return the penalty for all images since the last call; raise TrainingError where there was none."""
        unseen = [name for name, responses in zip(self.norms, self._responses, strict=True) if not responses.images]
        if unseen:
            where = "outside of `with`" if not self._hooks else f"{unseen[0]} has seen none"
            raise TrainingError(f"penalty() needs a forward in train mode since its last call; {where}")
        # One operation for all gates: there are a hundred norms, and each would need several small ones.
        gates = torch.cat(self._gates)
        weights = self._mean_responses().to(gates.device, gates.dtype)
        if self.branch_weights == "flops":
            sides = torch.tensor([responses.side for responses in self._responses])
            counts = torch.tensor([len(gate) for gate in self._gates])
            mean_side = float((sides * counts).sum() / counts.sum())
            weights = weights * (sides / mean_side).repeat_interleave(counts).to(weights)
        for responses in self._responses:
            responses.clear()
        return 0.5 * self.weight * torch.dot(weights, gates * gates)

    @torch.no_grad()
    def _mean_responses(self) -> Tensor:
        """Means over the images of all forward passes, (gates,)."""
        sizes = [[len(means) for means in responses.means] for responses in self._responses]
        if all(own == sizes[0] for own in sizes):
            forwards = zip(*(responses.means for responses in self._responses), strict=True)
            return sum(torch.cat(means, 1).abs().sum(0) for means in forwards) / self._responses[0].images
        return torch.cat([sum(m.abs().sum(0) for m in own.means) / own.images for own in self._responses])


class _Responses:
    """Collects the responses after one norm, image by image, of all forward passes."""

    def __init__(self, model: nn.Module, norm: str, activation: str | None):
        # A PReLU may be called "prelu" or "relu" in its model.
        is_prelu = isinstance(dict(unwrap(model).named_modules()).get(activation), nn.PReLU)
        self.function = getattr(F, activation) if activation is not None and not is_prelu else None
        # Deep copies of the model (a weight average, a teacher) inherit the hook, which must ignore them.
        self.module = weakref.ref(model.get_submodule(activation if is_prelu else norm))
        self.clear()

    def clear(self) -> None:
        self.means: list[Tensor] = []
        self.images, self.side = 0, 0.0

    def register_hook(self) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if module.training and module is self.module():
                self.add(output)

        return self.module().register_forward_hook(hook)

    @torch.no_grad()
    def add(self, y: Tensor) -> None:
        # A fused norm has computed these means already (prunekit.training.acceleration).
        means = getattr(y, "channel_means", None)
        if self.function is not None or means is None:
            y = y.detach() if self.function is None else self.function(y.detach())
            y = y if y.dtype == torch.float64 else y.float()
            means = y.flatten(2).mean(2) if y.dim() > 2 else y
        self.means.append(means)
        self.images += len(y)
        self.side = float(y[0, 0].numel()) ** 0.5
