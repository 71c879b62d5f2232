"""A mean of the weights of a training, the newer the more (Polyak and Juditsky, 1992; with an exponential window:
Tarvainen and Valpola, NeurIPS 2017). At the end of a short training it errs less than the last step's weights do.

torch's own ``AveragedModel`` does the sums. What is ours: a window that grows with the training, so that the first
weights, which are noise, are soon forgotten; and a state that a run goes on from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """The mean of a model's parameters and of its norms' statistics, step by step.

    It begins with what stands behind the first step; behind each later one, step n + 1, a share of
    ``min(decay, (1 + n) / (10 + n))`` of it is kept.

    Args:
        model: as it is before the first step; on its device, with no forwards of others set on it.
        decay: the share that is kept in the end: 0.999 averages over about 1000 steps.

    Attributes:
        model: the mean; a copy of the model that is trained, to be evaluated.
        steps: how many it has seen.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self._held = AveragedModel(model, multi_avg_fn=self._mean, use_buffers=True)
        self.model: nn.Module = self._held.module

    def update(self, model: nn.Module) -> None:
        """Take in the weights behind one more step."""
        self._held.update_parameters(model)
        self.steps += 1

    def put(self, model: nn.Module) -> None:
        """Give a model of the same shape the mean's weights."""
        model.load_state_dict(self.model.state_dict())

    def state(self) -> dict[str, Tensor]:
        """The mean; how many steps it has seen is the caller's to keep."""
        return self.model.state_dict()

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a ``state``; raises RuntimeError where it does not fit the model."""
        self.model.load_state_dict(state)
        self._held.n_averaged.fill_(steps)
        self.steps = steps

    @torch.no_grad()
    def _mean(self, held: Sequence[Tensor], now: Sequence[Tensor], _: Tensor) -> None:
        if held[0].is_floating_point():
            torch._foreach_lerp_(held, now, 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)))
        else:
            torch._foreach_copy_(held, now)
