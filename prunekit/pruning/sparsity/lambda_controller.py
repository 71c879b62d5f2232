"""Feedback control of λ, so that sparse training ends at a budget. See docs/design/sparsity.md for the choices."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.cost_model import ModelSize, SizeModel

SETPOINT_END = 0.85  # progress at which the setpoint reaches the threshold; the rest is for the surviving channels
PROPORTIONAL_GAIN = 2.0  # λ is proportional to this power of gate ÷ setpoint
INTEGRAL_RATE = 12.0  # λ grows by a factor e this often during a training in which gate ÷ setpoint stays at e
MAX_FACTOR = 30.0  # λ stays within this factor of its initial value
LOSS_MARGIN = 0.25  # logarithm by which the loss may rise above its minimum
LOSS_GAIN = 4.0  # how strongly a further rise of the loss reduces λ
MAX_LOG_STEP = 0.2  # largest change of log λ in one update
LOSS_MEMORY = 0.05  # progress over which losses are averaged
LOSS_FLOOR = 0.05  # of the first loss; smaller losses count as equal
MAX_LOG_ERROR = 2.0
_STATE = ("value", "start", "integral", "progress", "mean_loss", "first_loss", "min_loss")


class FeedbackController:
    """A proportional-integral controller in log space, without knowledge of models."""

    def __init__(self, initial: float, threshold: float):
        self.initial = self.value = initial  # λ
        self.threshold = max(threshold, 1e-12)  # the gate at which the budget has to be met in the end
        self.start: float | None = None
        self.integral = self.progress = 0.0
        self.mean_loss: float | None = None
        self.first_loss: float | None = None
        self.min_loss: float | None = None

    def setpoint(self, progress: float) -> float:
        """The wanted gate: between the linear decrease under Adam and the exponential one under gradient descent."""
        left = max(0.0, 1.0 - progress / SETPOINT_END)
        return self.threshold + max(0.0, (self.start or 0.0) - self.threshold) * left**2

    def update(self, progress: float, gate: float, loss: float | None = None) -> float:
        """Return the next λ.

        Args:
            progress: of the training, 0 to 1, in the integral of the learning rate where that is scheduled.
            gate: the effective gate at and below which channels must be pruned to meet the budget now.
            loss: mean loss of the task since the last call, if any.
        """
        if self.start is None:
            self.start = gate
        # Gates of zero have no logarithm; below the threshold a lower gate says little more.
        error = math.log(max(gate, self.threshold * math.exp(-MAX_LOG_ERROR)) / self.setpoint(progress))
        error = min(max(error, -MAX_LOG_ERROR), MAX_LOG_ERROR)
        excess = self.loss_excess(loss, progress - self.progress) - LOSS_MARGIN
        if excess > 0:
            error = max(min(error, 0.0) - LOSS_GAIN * excess, -MAX_LOG_ERROR)
        bound = math.log(MAX_FACTOR)
        increment = INTEGRAL_RATE * error * (progress - self.progress)
        wanted = PROPORTIONAL_GAIN * error + self.integral + increment
        # No integration at a bound, except away from it.
        if abs(wanted) < bound or increment * wanted < 0:
            self.integral += increment
        self.progress = progress
        current = math.log(self.value / self.initial)
        wanted = min(max(PROPORTIONAL_GAIN * error + self.integral, -bound), bound)
        self.value = self.initial * math.exp(min(max(wanted, current - MAX_LOG_STEP), current + MAX_LOG_STEP))
        return self.value

    def loss_excess(self, loss: float | None, elapsed: float) -> float:
        """The logarithm by which the average loss is above its minimum."""
        if loss is not None:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            before = loss if self.mean_loss is None else self.mean_loss
            self.mean_loss = before + (1 - math.exp(-elapsed / LOSS_MEMORY)) * (loss - before)
            self.min_loss = min(self.mean_loss, self.mean_loss if self.min_loss is None else self.min_loss)
        if self.mean_loss is None or self.min_loss is None or not (self.first_loss or 0.0) > 0:
            return 0.0
        floor = LOSS_FLOOR * self.first_loss
        return math.log((max(self.mean_loss, 0.0) + floor) / (max(self.min_loss, 0.0) + floor))

    def state_dict(self) -> dict[str, float | None]:
        return {key: getattr(self, key) for key in _STATE}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        for key in _STATE:
            setattr(self, key, state[key])


class LambdaController:
    """Controls λ of one training by the gates of its model.

    Args:
        size_model: of the model in training and its groups.
        measure: "params" or "macs".
        goal: the budget in this measure.
        threshold: of the effective gate.
        weight: λ at the beginning.
        limits: for the ids of groups how many of their channels may be pruned; 0 for all others.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        size_model: SizeModel,
        measure: str,
        goal: int,
        threshold: float,
        weight: float,
        limits: Mapping[str, int],
    ):
        self.model, self.size_model = model, size_model
        self.groups = [group for group in groups if limits.get(group.id)]
        self.measure, self.goal, self.threshold, self.limits = measure, goal, threshold, limits
        self.controller = FeedbackController(weight, threshold)

    @staticmethod
    def update_interval(steps: int) -> int:
        return max(1, min(10, steps // 100))

    def update(self, progress: float, loss: float | None = None) -> float:
        """Return the next λ; ``progress`` and ``loss`` as for :class:`FeedbackController`."""
        return self.controller.update(progress, self.gate_at_budget(), loss)

    def metrics(self) -> dict[str, dict[str, int]]:
        """The size if all channels at or below the threshold were pruned now, and the budget."""
        return {"size": {self.measure: getattr(self.size(), self.measure)}, "budget": {self.measure: self.goal}}

    def state_dict(self) -> dict[str, float | None]:
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, float | None]) -> float:
        """Continue from a state; return its λ."""
        self.controller.load_state_dict(state)
        return self.controller.value

    def gate_at_budget(self) -> float:
        """The effective gate at and below which channels must be pruned to meet the budget now; 0 if it is met."""
        if getattr(self.size_model.dense, self.measure) <= self.goal:
            return 0.0
        scores = self._scores()
        values = np.unique(np.concatenate(scores))

        def is_met(value: float) -> bool:
            return getattr(self._size_above(value, scores), self.measure) <= self.goal

        return float(values[bisect_left(values[:-1], True, key=is_met)])

    def size(self) -> ModelSize:
        """The size if all channels at or below the threshold were pruned now, within the limits."""
        return self._size_above(self.threshold, self._scores())

    def _scores(self) -> list[np.ndarray]:
        return [gate_scores(self.model, group) for group in self.groups]

    def _size_above(self, threshold: float, scores: list[np.ndarray]) -> ModelSize:
        dead = {
            group.id: min(int((values <= threshold).sum()), self.limits[group.id])
            for group, values in zip(self.groups, scores, strict=True)
        }
        return self.size_model.size_without(dead)
