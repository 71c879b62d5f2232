"""The loss of a training step: a recipe's loss and, with a teacher, knowledge distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.tasks.base import Task, main_output


@dataclass(frozen=True)
class TrainingLoss:
    """(1 - weight) · loss + weight · distillation loss (Hinton et al., 2015, section 2).

    Attributes:
        loss: of the model's output and targets, a scalar.
        task: defines the distillation loss.
        teacher: forward of a model in evaluation mode on the device of the student; None without distillation.
        weight: of the distillation loss, 0 … 1.
        temperature: divides the logits of student and teacher.
    """

    loss: Callable[[Any, Tensor], Tensor]
    task: Task | None = None
    teacher: Callable[[Tensor], Any] | None = None
    weight: float = 0.0
    temperature: float = 1.0

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor | None:
        """Return the teacher's logits for normalized images (N, 3, H, W); None without a teacher."""
        return None if self.teacher is None else main_output(self.teacher(images))

    def __call__(self, logits: Any, targets: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """Return the loss, a scalar; shapes as for :meth:`prunekit.tasks.base.Task.loss`."""
        loss = self.loss(logits, targets)
        if teacher_logits is None:
            return loss
        distillation = self.task.distillation_loss(main_output(logits), teacher_logits, self.temperature)
        return (1 - self.weight) * loss + self.weight * distillation
