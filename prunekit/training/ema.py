"""Exponential moving average (EMA) of the weights of a training (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The moving average of a model's parameters and floating-point buffers.

    The first step's weights start it; step n + 1 keeps a share of ``min(decay, (1 + n) / (10 + n))``, so the noisy
    first weights are soon forgotten.

    Args:
        model: before its first step and before its forwards are replaced; on its device.
        decay: 0.999 averages over about 1000 steps.

    Attributes:
        model: a copy of the model with the averaged weights.
        steps: number of averaged steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0
        self._floats, self._others = _split_tensors(self.model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after one more step."""
        floats, others = _split_tensors(model)
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        torch._foreach_lerp_(self._floats, floats, 1 - kept)
        if others:
            torch._foreach_copy_(self._others, others)
        self.steps += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Load the average into the trained model; what is zero there stays zero, so dead gates stay dead."""
        for average, current in zip(self._floats, _split_tensors(model)[0], strict=True):
            average.masked_fill_(current == 0, 0.0)
        model.load_state_dict(self.model.state_dict())

    def state(self) -> dict[str, Tensor]:
        """Return the averaged tensors; ``steps`` is not among them."""
        return self.model.state_dict()

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restore a ``state``; raises RuntimeError if it does not fit the model."""
        self.model.load_state_dict(state)
        self.steps = steps


def _split_tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters and buffers: those in floating point, and the others."""
    tensors = [*model.parameters(), *model.buffers()]
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    return floats, [tensor for tensor in tensors if not tensor.is_floating_point()]
