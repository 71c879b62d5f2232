"""Classification: one of several classes for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.config.registry import register_task
from prunekit.data.datasets import LabelDataset
from prunekit.data.image_folder import read_all
from prunekit.tasks.base import Metrics, Task, compute_metrics


class ClassificationMetrics(Metrics):
    """Top-1 accuracy, and the confusion matrix as a curve; the error of an image is 1 - probability of its class."""

    def __init__(self, classes: Sequence[str] = ()):
        super().__init__()
        self.classes = classes
        self.labels: list[tuple[int, int]] = []  # (target, prediction)

    def update(self, prediction: np.ndarray, target: int) -> None:
        self.labels.append((target, int(prediction.argmax())))
        self.errors.append(1 - float(prediction[target]))

    def compute(self) -> dict[str, float]:
        return {"top1": sum(target == label for target, label in self.labels) / len(self.labels)}

    def curves(self) -> dict[str, Any]:
        """Return ``classes`` and ``confusion``: [target][prediction] → number of images."""
        confusion = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(confusion, tuple(np.array(self.labels).T), 1)
        return {"classes": list(self.classes), "confusion": confusion.tolist()}


@register_task("classification")
class Classification(Task):
    """Classification: a logit per class, cross-entropy; top-1 accuracy."""

    metric_names = ("top1",)
    dataset_type = LabelDataset
    takes_logits = True

    def check_output(self, output: Any, size: int, images: LabelDataset) -> str | None:
        classes = len(images.classes)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape == (1, classes):
            return None
        if isinstance(shape, tuple) and len(shape) == 2:
            return (
                f"the data set has {classes} classes, and the model has {shape[1]} outputs; set their number, for "
                f"resnet with backbone.options.classes={classes}"
            )
        return (
            f"the model must return logits of shape (1, {classes}) for one image, not {shape}; choose another "
            "backbone or task"
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits [B, K] and labels, int64 [B]."""
        return F.cross_entropy(logits.float(), targets)

    def distillation_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Return temperature² times the cross-entropy with the teacher's probabilities; logits are [B, K]."""
        soft = torch.softmax(teacher_logits.float() / temperature, 1)
        return temperature**2 * F.cross_entropy(logits.float() / temperature, soft)

    def make_metrics(self, classes: Sequence[str] = (), quick: bool = False) -> ClassificationMetrics:
        return ClassificationMetrics(classes)

    def activation(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, 1)

    def decode_target(self, target: Tensor) -> int:
        return int(target)

    def render(self, prediction: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
        """Return the most probable ``class`` and its ``probability``."""
        label = int(prediction.argmax())
        return {"class": classes[label], "probability": round(float(prediction[label]), 6)}

    def trivial_scores(self, images: LabelDataset) -> dict[str, dict[str, float]]:
        """Return ``majority``: the most frequent class for every image."""
        labels = [images.target(index) for index in range(len(images))]
        metrics, majority = ClassificationMetrics(), np.bincount(labels or [0])
        for label in labels:
            metrics.update(majority, label)
        return {"majority": compute_metrics(metrics)}

    def read_folder(self, folder: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> LabelDataset:
        """Read a folder that holds a folder of images per class, for some or all of the classes."""
        return read_all(folder, on_error, classes)
