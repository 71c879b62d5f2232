"""The phases of a training: consecutive epochs at one image size, batch size and strength of the augmentation.

Schedules count epochs, not steps, since an epoch may have more steps in one phase than in another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from prunekit.config.schema import Training
from prunekit.errors import TrainingError


@dataclass(frozen=True)
class Phase:
    """Epochs that are alike.

    Attributes:
        first: its first epoch, from 0.
        size: height and width of the images.
        batch_size: images of a micro-batch.
        steps: optimizer steps of an epoch.
        strength: factor on the option ``strength`` of the augmentation; None: the option is not set.
    """

    first: int
    size: int
    batch_size: int
    steps: int
    strength: float | None


class Phases:
    """The phases of one training; a single one without ``progressive.sizes``.

    Args:
        config: section of the recipe.
        size: ``data.size``.
        images: number of training images.
        micro_batches: of a step in all processes.

    Attributes:
        total_steps: of all epochs.
        total: what :meth:`done` returns at the end, at least 1.

    Raises:
        TrainingError: there are fewer images than micro-batches.
    """

    def __init__(self, config: Training, size: int, images: int, micro_batches: int):
        most = images // micro_batches
        if not most:
            raise TrainingError(
                f"{images} images are too few for the {micro_batches} batches of a step; "
                "start fewer processes, or lower train.accumulate and finetune.accumulate"
            )
        self._epochs, progressive = config.epochs, config.progressive
        sizes = progressive.sizes or [size]
        first = progressive.first_epochs(config.epochs) if progressive.sizes else [0]
        batch_sizes = [min(one, most) for one in progressive.batch_sizes or [config.batch_size] * len(sizes)]
        steps = [images // (one * micro_batches) for one in batch_sizes]
        strengths = progressive.strengths or [None] * len(sizes)
        self._phases = [Phase(*one) for one in zip(first, sizes, batch_sizes, steps, strengths, strict=True)]
        # An epoch has as many parts as are needed to divide them evenly among its steps in every phase.
        self._parts = math.lcm(*steps)
        self.total_steps = self.steps_before(self._epochs)
        self.total = max(1, self._epochs * self._parts)

    @property
    def last(self) -> Phase:
        return self._phases[-1]

    @property
    def sizes(self) -> list[int]:
        return [phase.size for phase in self._phases]

    def at(self, epoch: int) -> Phase:
        """Return the phase of an epoch, from 0; the last one after the end."""
        return next(phase for phase in reversed(self._phases) if phase.first <= epoch)

    def steps_before(self, epoch: int) -> int:
        """Return the number of optimizer steps of the epochs before this one."""
        return sum(self.at(number).steps for number in range(epoch))

    def parts_of_a_step(self, epoch: int) -> int:
        """Return by how much a step of this epoch increases :meth:`done`."""
        return self._parts // self.at(epoch).steps

    def done(self, epoch: int, step: int) -> int:
        """Return how far the training is before a step of an epoch, both from 0; ``done / total`` is the share of
        finished epochs. Without progressive sizes, this is the number of finished steps."""
        return epoch * self._parts + step * self.parts_of_a_step(epoch)

    def shares(self) -> Iterator[float]:
        """Yield, for each step of the training, the share of the training that is finished before it."""
        for epoch in range(self._epochs):
            for step in range(self.at(epoch).steps):
                yield self.done(epoch, step) / self.total
