"""Classification: which of several classes an image belongs to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.config.registry import register_task
from prunekit.data.datasets import LabelDataset, Tensors, normalize
from prunekit.data.image_folder import read_all
from prunekit.errors import DataError
from prunekit.tasks.base import Progress, Result, Task, inference, outputs, passes

_EMPTY = "there is no image to evaluate; check data.val_root and data.val_holdout"


@register_task("classification")
class Classification(Task):
    """Classification: a logit for each class, cross-entropy; top-1 accuracy."""

    metric_names = ("top1",)
    data = LabelDataset
    pictures = False

    def fault(self, output: Any, size: int, images: LabelDataset) -> str | None:
        classes = len(images.classes)
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if found == (1, classes):
            return None
        if isinstance(found, tuple) and len(found) == 2:
            return (
                f"the data set has {classes} classes, and the model gives {found[1]} outputs; give it as many, "
                f"as with backbone.options.classes={classes} for resnet"
            )
        return (
            f"it needs a logit for each class, (1, {classes}) for one image, and the model gives {found}; "
            "name another backbone, or another task"
        )

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of logits [B, K] against labels [B] of 0 to K - 1: a scalar."""
        return F.cross_entropy(logits.float(), targets)

    def distance(self, logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Mean cross-entropy against the teacher's probabilities, both logits divided by the temperature, times its
        square: a scalar."""
        soft = torch.softmax(taught.float() / temperature, 1)
        return temperature**2 * F.cross_entropy(logits.float() / temperature, soft)

    def predict(self, model: nn.Module, image: np.ndarray, size: int | None) -> np.ndarray:
        """The probability of each class: float32 [K]."""
        with inference(model) as device:
            return outputs(model, [image], size, device, _probabilities)[0].numpy()

    def show(self, prediction: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
        """The likeliest ``class`` and its ``probability``."""
        label = int(prediction.argmax())
        return {"class": classes[label], "probability": round(float(prediction[label]), 6)}

    def quick(self, model: nn.Module, tensors: Tensors, batch_size: int) -> dict[str, float]:
        """``top1`` at the tensors' own size.

        Raises:
            DataError: the set is empty.
        """
        if not len(tensors):
            raise DataError(_EMPTY)
        right = 0
        with inference(model) as device:
            for start in range(0, len(tensors), batch_size):
                batch = slice(start, start + batch_size)
                logits = model(normalize(tensors.images[batch].to(device)))
                if not torch.isfinite(logits).all():
                    return {}
                right += int((logits.argmax(1).cpu() == tensors.targets[batch]).sum())
        return {"top1": right / len(tensors)}

    def evaluate(
        self, model: nn.Module, pairs: LabelDataset, size: int | None, batch_size: int, progress: Progress | None = None
    ) -> Result:
        """``top1`` of a set, an image's error being 1 less the probability of its class.

        The curves are ``classes`` and the ``confusion`` matrix: how many images of the row's class were taken for the
        column's. Args and errors as for :meth:`Task.evaluate`.
        """
        confusion = np.zeros((len(pairs.classes),) * 2, np.int64)
        errors = []
        with inference(model) as device:
            for batch in passes(pairs, batch_size, progress):
                found = outputs(model, [image for image, _ in batch], size, device, _probabilities)
                for probabilities, (_, label) in zip(found, batch, strict=True):
                    confusion[label, int(probabilities.argmax())] += 1
                    errors.append(1 - float(probabilities[label]))
        if not errors:
            raise DataError(_EMPTY)
        metrics = {"top1": int(confusion.trace()) / len(errors)}
        curves = {"classes": list(pairs.classes), "confusion": confusion.tolist()}
        return Result(metrics, curves, errors, list(pairs.names))

    def reference(self, pairs: LabelDataset) -> dict[str, dict[str, float]]:
        """What it reaches to call every image by the set's most frequent class: ``majority`` → ``top1``."""
        labels = [pairs.target(index) for index in range(len(pairs))]
        if not labels:
            raise DataError(_EMPTY)
        return {"majority": {"top1": int(np.bincount(labels).max()) / len(labels)}}

    def read_folder(self, folder: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> LabelDataset:
        """All images of a folder that has a folder of images for each of some of these classes."""
        return read_all(folder, on_error, classes)


_probabilities = functools.partial(torch.softmax, dim=1)
