"""The base class of tasks, and the evaluation protocol that they share.

Protocol (Gao et al., ECCV 2020): an RGB image is resized bilinearly without anti-aliasing, scaled to 0 … 1, and
normalized with ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.data.datasets import ImageDataset, Tensors, image_tensor, normalize, read_pair, resize
from prunekit.errors import DataError, RecipeError, TrainingError
from prunekit.utils.copying import kept_modes

OWN_SIZE_MULTIPLE = 16  # a network with four halvings divides such sides evenly
# Pixels per forward on a CPU: smaller batches stay in its cache and take about half the time (docs/design/training.md).
_CPU_PIXELS = 4 * 224 * 224

Progress = Callable[[int, int], None]  # (images done, all images)


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a data set."""

    metrics: dict[str, float]
    curves: dict[str, Any]  # plain values for curves.json
    errors: list[float]  # one value per image in the order of the data set; larger is worse
    names: list[str] = field(default_factory=list)  # of the images
    warning: str | None = None  # see Metrics.warning


class Metrics(ABC):
    """Accumulates the metrics of a data set image by image."""

    def __init__(self) -> None:
        self.errors: list[float] = []  # one value per image, larger is worse; ``update`` appends it

    @abstractmethod
    def update(self, prediction: np.ndarray, target: Any) -> None:
        """Add one image.

        Args:
            prediction: from :meth:`Task.postprocess`.
            target: as the data set returns it.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the metrics of at least one image: finite numbers by name."""

    def curves(self) -> dict[str, Any]:
        """Return what can be plotted, as lists and numbers for JSON."""
        return {}

    def warning(self) -> str | None:
        """Return what is suspicious about the targets of the whole set; None if nothing is."""
        return None


class Task(ABC):
    """What a model is trained for: its loss, metrics and predictions.

    A subclass defines the three attributes, :meth:`loss` and :meth:`make_metrics`, and overrides what differs from the
    defaults; ``@register_task(name)`` makes it available to recipes. It takes no arguments. Below, B is the batch size,
    S the side of the training images, and (H, W) the size of an image in its file.

    Attributes:
        metric_names: keys of the metrics; models are compared by the first.
        lower_is_better: those of them for which lower is better.
        dataset_type: the class of data sets for the task.
        predicts_images: whether :meth:`render` returns images.
        takes_logits: whether the loss expects logits, so that a model must not end in a sigmoid or softmax.
    """

    metric_names: tuple[str, ...]
    lower_is_better: frozenset[str] = frozenset()
    dataset_type: type[ImageDataset]
    predicts_images: bool = False
    takes_logits: bool = False

    # Of a model that returns several outputs, the first is evaluated; the loss is the sum over all of them.

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar with gradient.

        Args:
            logits: an output of the model, [B, …]; bfloat16 with ``precision: bf16``.
            targets: as ``empty_targets`` and ``encode_target`` of the data set define them, [B, …].
        """

    @abstractmethod
    def make_metrics(self, classes: Sequence[str] = (), quick: bool = False) -> Metrics:
        """Return empty metrics.

        Args:
            classes: names of the data set's classes; empty for validation during training.
            quick: for validation after each epoch, which may leave out slow metrics.
        """

    def check_output(self, output: Any, size: int, images: ImageDataset) -> str | None:
        """Return the problem and its fix if the model's output for an input [1, 3, size, size] is wrong, else None."""
        return None if isinstance(output, Tensor) else f"the model must return a tensor, not {type(output).__name__}"

    def activation(self, logits: Tensor) -> Tensor:
        """Return scores of the same shape from float32 logits [B, …], such as probabilities."""
        return logits

    def postprocess(self, scores: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Return the prediction for one image from its scores […] on the CPU, where ``size`` is its (H, W)."""
        return scores.numpy()

    def decode_target(self, target: Tensor) -> Any:
        """Return a row of the training targets as a target of the data set; for validation at S × S."""
        return target.numpy()

    def render(self, prediction: np.ndarray, classes: Sequence[str]) -> np.ndarray | dict[str, Any]:
        """Return a prediction for display: an image, uint8 [H, W], or columns of a table."""
        return prediction if self.predicts_images else {"prediction": prediction.tolist()}

    def distillation_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Return the distance to a teacher's logits, a scalar with gradient, for ``finetune.distill``.

        Args:
            logits: output of the model, [B, …].
            teacher_logits: of the teacher, of the same shape.
            temperature: divides both; the size of the gradient should not depend on it.

        Raises:
            RecipeError: the task does not define it.
        """
        raise RecipeError("the task defines no distillation loss; set finetune.distill.weight=0")

    def read_folder(self, folder: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> ImageDataset:
        """Return a folder as a data set, for ``prunekit evaluate``.

        Args:
            classes: of the model, if it has any.

        Raises:
            DataError: the folder cannot be used.
        """
        raise DataError(f"the task {type(self).__name__} reads no folders; define its read_folder")

    def trivial_scores(self, images: ImageDataset) -> dict[str, dict[str, float]]:
        """Return the metrics of predictors that need no training, by name; for comparison. May raise DataError."""
        return {}

    def best(self, scores: dict[str, dict[str, float]]) -> str:
        """Return the name with the best metrics, by the first of :attr:`metric_names`."""
        name = self.metric_names[0]
        return (min if name in self.lower_is_better else max)(scores, key=lambda key: scores[key][name])

    def validate(self, model: nn.Module, tensors: Tensors, batch_size: int) -> dict[str, float]:
        """Return quick metrics of a data set in memory, at S × S; none if an output of the model is not finite, which
        is possible in the first epochs.

        Raises:
            DataError: the data set is empty.
        """
        metrics, size = self.make_metrics(quick=True), tuple(tensors.images.shape[-2:])
        with inference(model) as device:
            batch_size = min(batch_size, _largest_batch(device, size))
            for images, targets in zip(
                tensors.images.split(batch_size), tensors.targets.split(batch_size), strict=True
            ):
                logits = _forward(model, normalize(images.to(device)))
                if not torch.isfinite(logits).all():
                    return {}
                for scores, target in zip(self.activation(logits).cpu(), targets.cpu(), strict=True):
                    metrics.update(self.postprocess(scores, size), self.decode_target(target))
        return compute_metrics(metrics)

    def evaluate(
        self,
        model: nn.Module,
        images: ImageDataset,
        size: int | None,
        batch_size: int,
        progress: Progress | None = None,
    ) -> EvaluationResult:
        """Return all metrics of a data set.

        Args:
            model: takes [B, 3, h, w].
            images: with ``skip_errors``, unreadable images are dropped.
            size: height and width of the model's input; None for each image's own size (:func:`own_size`).
            batch_size: images in memory at once, and at most in one forward.
            progress: called after each batch.

        Raises:
            DataError: the data set is empty, or an image is unreadable.
            TrainingError: an output of the model is not finite.
        """
        metrics = self.make_metrics(images.classes)
        with inference(model) as device:
            for batch in iterate_batches(images, batch_size, progress):
                predictions = self._predict(model, [image for image, _ in batch], size, device)
                for prediction, (_, target) in zip(predictions, batch, strict=True):
                    metrics.update(prediction, target)
        computed = compute_metrics(metrics)
        return EvaluationResult(computed, metrics.curves(), list(metrics.errors), list(images.names), metrics.warning())

    def predict(self, model: nn.Module, image: np.ndarray, size: int | None) -> np.ndarray:
        """Return the prediction for one image, uint8 [H, W, 3] RGB; ``size`` as for :meth:`evaluate`."""
        with inference(model) as device:
            return self._predict(model, [image], size, device)[0]

    def _predict(
        self, model: nn.Module, images: Sequence[np.ndarray], size: int | None, device: torch.device
    ) -> list[np.ndarray]:
        if size is None:
            inputs = [resize(image_tensor(image), own_size(*image.shape[:2])) for image in images]
        else:
            planes = torch.cat([resize(image_tensor(image), (size, size)) for image in images])
            inputs = planes.split(min(len(planes), _largest_batch(device, (size, size))))
        scores: list[Tensor] = []
        for batch in inputs:
            logits = _forward(model, normalize(batch.to(device)))
            if not torch.isfinite(logits).all():
                # A map or class computed from it would look like any other.
                raise TrainingError(
                    "the model's output for an image is not finite, so it cannot be evaluated; train with a lower lr"
                )
            scores += self.activation(logits).cpu()
        return [self.postprocess(one, image.shape[:2]) for one, image in zip(scores, images, strict=True)]


def all_outputs(output: Any) -> list[Any]:
    """Return the outputs of a model with side outputs (a tuple, list or dict of tensors), the main one first."""
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else [output]


def main_output(output: Any) -> Any:
    """Return the first output of a model with side outputs, else the output."""
    return next(iter(all_outputs(output)), output)


def compute_metrics(metrics: Metrics) -> dict[str, float]:
    """Return the computed metrics; raise DataError if there is no image."""
    if not metrics.errors:
        raise DataError("there is no image to evaluate; check data.val_root and data.val_holdout")
    return metrics.compute()


def iterate_batches(
    images: ImageDataset, batch_size: int, progress: Progress | None = None
) -> Iterator[list[tuple[np.ndarray, Any]]]:
    """Yield batches of (image, target); at the end, drop unreadable images of a data set with ``skip_errors``.

    Raises:
        DataError: an image is unreadable.
    """
    dropped = []
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        batch = []
        for index in range(start, stop):
            try:
                batch.append(read_pair(images, index))
            except DataError:
                if not images.skip_errors:
                    raise
                dropped.append(index)
        if batch:
            yield batch
        if progress is not None:
            progress(stop, len(images))
    images.drop(dropped)


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Set evaluation mode without gradients, yield the model's device, and restore the mode of every module."""
    parameter = next(model.parameters(), None)
    with kept_modes(model), torch.inference_mode():
        model.eval()
        yield torch.device("cpu") if parameter is None else parameter.device


def own_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width rounded up to multiples of 16: the model's input for an image at its own size."""
    return tuple(-(-side // OWN_SIZE_MULTIPLE) * OWN_SIZE_MULTIPLE for side in (height, width))


def _largest_batch(device: torch.device, size: tuple[int, ...]) -> int:
    """Return how many images of a size go through a model at once."""
    return max(1, _CPU_PIXELS // math.prod(size)) if device.type == "cpu" else sys.maxsize


def _forward(model: nn.Module, batch: Tensor) -> Tensor:
    # Channels-last halves the time on CPUs; models that take views of their features may refuse it.
    try:
        output = model(batch.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        output = model(batch)
    return main_output(output).float()
