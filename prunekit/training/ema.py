"""A mean of the weights of a training, the newer the more (Polyak and Juditsky, 1992; with an exponential window:
Tarvainen and Valpola, NeurIPS 2017). At the end of a short training it errs less than the last step's weights do.

(torch's ``AveragedModel`` was weighed: it sends its count of steps to the device in each of them, which an accelerator
waits for, and its window does not grow.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The mean of a model's parameters and of its norms' statistics, step by step.

    It begins with what stands behind the first step; behind each later one, step n + 1, a share of
    ``min(decay, (1 + n) / (10 + n))`` of it is kept. So the first weights, which are noise, are soon forgotten.

    Args:
        model: as it is before the first step; on its device, with no forwards of others set on it.
        decay: the share that is kept in the end: 0.999 averages over about 1000 steps.

    Attributes:
        model: the mean; a copy of the model that is trained, to be evaluated.
        steps: how many it has seen.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0
        self._floats, self._others = _parts(self.model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights behind one more step."""
        floats, others = _parts(model)
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        torch._foreach_lerp_(self._floats, floats, 1 - kept)
        if others:
            torch._foreach_copy_(self._others, others)
        self.steps += 1

    @torch.no_grad()
    def put(self, model: nn.Module) -> None:
        """Give the model that was trained the mean's weights. What is zero in it stays so: the mean of a gate that has
        died still remembers that it lived."""
        for mean, now in zip(self._floats, _parts(model)[0], strict=True):
            mean.masked_fill_(now == 0, 0.0)
        model.load_state_dict(self.model.state_dict())

    def state(self) -> dict[str, Tensor]:
        """The mean; how many steps it has seen is the caller's to keep."""
        return self.model.state_dict()

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a ``state``; raises RuntimeError where it does not fit the model."""
        self.model.load_state_dict(state)
        self.steps = steps


def _parts(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """A model's parameters and buffers: floating point, and the rest."""
    tensors = [*model.parameters(), *model.buffers()]
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    return floats, [tensor for tensor in tensors if not tensor.is_floating_point()]
