"""What a step learns by: the loss of a recipe and, where there is a teacher, what the teacher gives for the same images
(Hinton et al., 2015, section 2; for maps each pixel is a class of its own)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.tasks.base import Task


@dataclass(frozen=True)
class TrainingLoss:
    """Loss and teacher of one training.

    Attributes:
        loss: of logits and targets, a scalar.
        task: says how far logits are from a teacher's.
        teacher: the forward of a model in evaluation mode, on the device of the one that learns; None without.
        share: the teacher's, of the loss, 0 … 1.
        temperature: divides the logits of both.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    task: Task | None = None
    teacher: Callable[[Tensor], Tensor] | None = None
    share: float = 0.0
    temperature: float = 1.0

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor | None:
        """What the teacher gives for these images, normalised, [B, 3, S, S]; None without one."""
        return None if self.teacher is None else self.teacher(images)

    def __call__(self, logits: Tensor, targets: Tensor, taught: Tensor | None) -> Tensor:
        """A scalar.

        Args:
            logits: what the model gives for images.
            targets: as for :meth:`prunekit.tasks.base.Task.loss`.
            taught: what :meth:`taught` gives for them.
        """
        loss = self.loss(logits, targets)
        if taught is None:
            return loss
        return (1 - self.share) * loss + self.share * self.task.distance(logits, taught, self.temperature)
