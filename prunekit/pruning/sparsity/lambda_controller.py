"""λ by feedback: sparse training that is to end at a budget.

What is steered is not the count of living channels: gates fall below the threshold late and many at once, so for most
of a training a count says nothing, and an integral over it winds up. It is the *reach*: the effective gate below which
everything would have to be cut now to meet the budget. It falls from the first step on, it goes to the threshold where
the training is to end, and that is the way that it is given. In logarithms, since λ acts in factors: a proportional
and an integral part of log(reach ÷ way), λ bounded, and the integral held while λ stands at a bound.

The task has a say too. Where no λ brings the reach down in time, more of it only shrinks all gates alike (the next norm
undoes that) and ruins what has been learned. So a loss that has risen above its lowest takes λ back, and the budget is
met in the end by cutting channels that are alive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.cost_model import ModelSize, SizeModel

ARRIVAL = 0.85  # share of the way at which the reach is to be at the threshold; the rest is for those that live
GAIN = 2.0  # λ goes with this power of reach ÷ way …
RATE = 12.0  # … and grows by e this often within a training in which reach ÷ way stays at e
RANGE = 30.0  # λ stays within this factor of what the recipe says
EASE = 0.25  # the logarithm by which the loss may rise before λ goes no higher
STRAIN = 4.0  # how strongly what it rises beyond that takes λ back
PACE = 0.2  # the logarithm by which λ changes at most in one look
MEMORY = 0.05  # share of the way over which losses are averaged
FLOOR = 0.05  # of the first loss: what is below it is as good as no loss
FAR = 2.0  # the logarithm beyond which reach ÷ way counts no more
STATE = ("now", "start", "integral", "last", "loss", "first_loss", "least")


class FeedbackController:
    """From how far a training is and how far it should be, to λ. It knows nothing of models.

    Args:
        weight: λ at the beginning.
        threshold: where the reach is to arrive.
    """

    def __init__(self, weight: float, threshold: float):
        self.weight = weight
        self.threshold = max(threshold, 1e-12)
        self.now = weight
        self.start: float | None = None
        self.integral = 0.0
        self.last = 0.0
        self.loss: float | None = None
        self.first_loss: float | None = None
        self.least: float | None = None

    def way(self, progress: float) -> float:
        """Where the reach should be. Between the straight line on which Adam moves gates and the exponential on which
        plain gradient descent does."""
        left = max(0.0, 1.0 - progress / ARRIVAL)
        return self.threshold + max(0.0, (self.start or 0.0) - self.threshold) * left**2

    def update(self, progress: float, reach: float, loss: float | None = None) -> float:
        """λ from now on.

        Args:
            progress: of the training, 0 … 1; the share of the way that the learning rate lets parameters go, not of
                the steps, where the rate changes.
            reach: the effective gate below which all would have to be cut to meet the budget.
            loss: the task's, the mean since the last call; None where there is none yet.
        """
        if self.start is None:
            self.start = reach
        # Gates that are zero have no logarithm; below the threshold, further down says little more.
        off = math.log(max(reach, self.threshold * math.exp(-FAR)) / self.way(progress))
        off = min(max(off, -FAR), FAR)
        excess = self.strain(loss, progress - self.last) - EASE
        if excess > 0:
            off = max(min(off, 0.0) - STRAIN * excess, -FAR)
        bound = math.log(RANGE)
        step = RATE * off * (progress - self.last)
        wanted = GAIN * off + self.integral + step
        if abs(wanted) < bound or step * wanted < 0:
            self.integral += step
        self.last = progress
        before = math.log(self.now / self.weight)
        wanted = min(max(GAIN * off + self.integral, -bound), bound)
        self.now = self.weight * math.exp(min(max(wanted, before - PACE), before + PACE))
        return self.now

    def strain(self, loss: float | None, passed: float) -> float:
        """How far the loss, averaged, stands above its lowest, as a logarithm."""
        if loss is not None:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            before = loss if self.loss is None else self.loss
            self.loss = before + (1 - math.exp(-passed / MEMORY)) * (loss - before)
            self.least = min(self.loss, self.loss if self.least is None else self.least)
        if self.loss is None or not self.first_loss > 0:
            return 0.0
        floor = FLOOR * self.first_loss
        return math.log((max(self.loss, 0.0) + floor) / (max(self.least, 0.0) + floor))

    def state(self) -> dict[str, float | None]:
        """All that changes, as JSON."""
        return {key: getattr(self, key) for key in STATE}

    def load(self, state: dict[str, float | None]) -> float:
        """Go on from a ``state``; λ as it was."""
        for key in STATE:
            setattr(self, key, state[key])
        return self.now


class LambdaController:
    """λ of one training, from its model's gates.

    Args:
        model: under training.
        groups: of the model.
        sizes: of the model and these groups.
        measure: "params" or "macs".
        goal: the budget in this measure.
        threshold: of the effective gate.
        weight: λ at the beginning.
        most: how many channels of each group may go; 0 where it is not named.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        sizes: SizeModel,
        measure: str,
        goal: int,
        threshold: float,
        weight: float,
        most: Mapping[str, int],
    ):
        self.model = model
        self.groups = [group for group in groups if most.get(group.id)]
        self.most = most
        self.sizes = sizes
        self.measure = measure
        self.goal = goal
        self.controller = FeedbackController(weight, threshold)
        self.threshold = threshold

    @staticmethod
    def every(steps: int) -> int:
        """How many steps lie between two looks in a training of so many."""
        return max(1, min(10, steps // 100))

    def look(self, progress: float, loss: float | None = None) -> float:
        """λ from now on; ``progress`` and ``loss`` as for :class:`Controller`."""
        return self.controller.update(progress, self.reach(), loss)

    def figures(self) -> dict[str, dict[str, int]]:
        """For the metrics: the size that the plan would have now, and the budget."""
        return {"size": {self.measure: getattr(self.size(), self.measure)}, "budget": {self.measure: self.goal}}

    def state(self) -> dict[str, float | None]:
        return self.controller.state()

    def load(self, state: dict[str, float | None]) -> float:
        return self.controller.load(state)

    def reach(self) -> float:
        """The effective gate at and below which all would have to be cut now to meet the budget; 0 where nothing has
        to be."""
        if getattr(self.sizes.dense, self.measure) <= self.goal:
            return 0.0
        values = self._values()
        steps = np.unique(np.concatenate(values))
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            met = getattr(self._without(values, steps[middle]), self.measure) <= self.goal
            low, high = (low, middle) if met else (middle + 1, high)
        return float(steps[low])

    def size(self) -> ModelSize:
        """What would be left if all at and below the threshold were cut now that may be."""
        return self._without(self._values(), self.threshold)

    def _values(self) -> list[np.ndarray]:
        return [gate_scores(self.model, group) for group in self.groups]

    def _without(self, values: list[np.ndarray], threshold: float) -> ModelSize:
        dead = {
            group.id: min(int((value <= threshold).sum()), self.most[group.id])
            for group, value in zip(self.groups, values, strict=True)
        }
        return self.sizes.size_without(dead)
