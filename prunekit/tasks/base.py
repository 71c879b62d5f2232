"""What every task gives, and what tasks share: passes over a set, and a model's outputs by the published protocol.

Protocol (Gao et al., ECCV 2020): the RGB image in 0 … 1 is resized (half-pixel bilinear, no anti-aliasing), and
ImageNet's mean and deviation are taken out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from prunekit.data.datasets import ImageDataset, Tensors, image_tensor, normalize, read_pair, resize
from prunekit.errors import DataError, RecipeError, TrainingError

# At its own size an image's sides are rounded up to what a network with four halvings divides evenly.
OWN_SIZE_MULTIPLE = 16
# Pixels in one forward pass on a CPU. Larger ones spend as much time on fetching memory as on computing: CSNet ×2 at
# 224×224 on one core takes 383 ms an image in batches of 16, and 215 ms in batches of 4.
_CPU_PIXELS = 4 * 224 * 224

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        metrics: the task's figures of the whole set.
        curves: what can be drawn of it; plain values, for ``curves.json``.
        errors: one value for each image, in the set's order; the larger, the worse.
        names: the set's names, in the same order.
        maps: saliency: uint8 [H, W] maps of the indices asked for.
    """

    metrics: dict[str, float]
    curves: dict[str, Any]
    errors: list[float]
    names: list[str] = field(default_factory=list)
    maps: dict[int, np.ndarray] = field(default_factory=dict)


class Task(ABC):
    """What a model is trained for.

    Attributes:
        metric_names: what :meth:`evaluate` measures; the first is the figure that models are compared by.
        lower_is_better: those of them of which less is better.
        data: the kind of set that it learns from.
        pictures: whether :meth:`show` gives pictures.
    """

    metric_names: tuple[str, ...]
    lower_is_better: frozenset[str] = frozenset()
    data: type[ImageDataset]
    pictures: bool

    @abstractmethod
    def fault(self, output: Any, size: int, images: ImageDataset) -> str | None:
        """What is wrong with a model's output for one image [1, 3, size, size] of this set, and the mend; None where it
        is as it should be."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch: a scalar with a gradient.

        Args:
            logits: the model's output.
            targets: of these images, as :class:`prunekit.data.datasets.Tensors` holds them (masks may be float).
        """

    def distance(self, logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """How far logits are from a teacher's, for ``finetune.distill``: a scalar with a gradient, of the size of
        :meth:`loss` at every temperature.

        Args:
            logits: the model's output.
            taught: the teacher's for the same images.
            temperature: divides both.

        Raises:
            RecipeError: the task cannot say it.
        """
        raise RecipeError(
            "the task has no measure of how far a model is from its teacher; set finetune.distill.weight=0"
        )

    @abstractmethod
    def quick(self, model: nn.Module, tensors: Tensors, batch_size: int) -> dict[str, float]:
        """Some figures, fast, for a look after each epoch; none where the model's output is not finite, as that of a
        model whose norms have seen little yet may be.

        Raises:
            DataError: the set is empty.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, pairs: ImageDataset, size: int | None, batch_size: int, progress: Progress | None = None
    ) -> Result:
        """All figures of a set.

        Args:
            model: takes [B, 3, h, w].
            pairs: the set; if tolerant, it loses what cannot be read.
            size: side of the square that the model sees; None: each image's own size (:func:`own_size`), one at a time.
            batch_size: images in hand at once, and the most in one forward pass.
            progress: called with (images done, images in all) after each batch.

        Raises:
            DataError: the set is empty, or something cannot be read and the set is not tolerant.
        """

    @abstractmethod
    def predict(self, model: nn.Module, image: np.ndarray, size: int | None) -> np.ndarray:
        """What the model says of one image.

        Args:
            image: uint8 [H, W, 3], RGB.
            size: as for :meth:`evaluate`.
        """

    @abstractmethod
    def show(self, prediction: np.ndarray, classes: Sequence[str]) -> np.ndarray | dict[str, Any]:
        """A prediction as people look at it: a picture, uint8 [H, W], or a row of a table."""

    @abstractmethod
    def read_folder(self, folder: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> ImageDataset:
        """A whole folder as a set of the task's kind.

        Args:
            classes: those that the model tells apart, where it tells any.

        Raises:
            DataError: the folder cannot be used.
        """

    def reference(self, pairs: ImageDataset) -> dict[str, dict[str, float]]:
        """What trivial predictors reach on a set: name → metrics. None, where a task has no such predictor.

        Raises:
            DataError: as for :meth:`evaluate`.
        """
        return {}

    def best(self, found: dict[str, dict[str, float]]) -> str:
        """The name whose metrics are best, by the first of :attr:`metric_names`."""
        main = self.metric_names[0]
        return (min if main in self.lower_is_better else max)(found, key=lambda name: found[name][main])


def passes(
    pairs: ImageDataset, batch_size: int, progress: Progress | None = None
) -> Iterator[list[tuple[np.ndarray, Any]]]:
    """Go through a set: batches of (image, target). A tolerant set has lost what cannot be read at the end.

    Raises:
        DataError: something cannot be read and the set is not tolerant.
    """
    dropped = []
    for start in range(0, len(pairs), batch_size):
        batch = []
        for index in range(start, min(start + batch_size, len(pairs))):
            try:
                batch.append(read_pair(pairs, index))
            except DataError:
                if not pairs.skip_errors:
                    raise
                dropped.append(index)
        if batch:
            yield batch
        if progress is not None:
            progress(min(start + batch_size, len(pairs)), len(pairs))
    pairs.drop(dropped)


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the model's device, and restores the mode of every module afterwards."""
    # Module by module: a model with some frozen norms in evaluation mode must come back as it was.
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    model.eval()
    try:
        with torch.inference_mode():
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module, mode in modes.items():
            module.training = mode


def own_size(height: int, width: int) -> tuple[int, int]:
    """Height and width rounded up to multiples of 16, which is what a model sees of an image at its own size."""
    return tuple(-(-side // OWN_SIZE_MULTIPLE) * OWN_SIZE_MULTIPLE for side in (height, width))


def outputs(
    model: nn.Module,
    images: Sequence[np.ndarray],
    size: int | None,
    device: torch.device,
    last: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """What a model gives for images by the protocol: a tensor on the CPU for each.

    Args:
        model: in evaluation mode; takes [B, 3, h, w].
        images: uint8 [H, W, 3] each.
        size: as for :meth:`Task.evaluate`.
        last: makes of the logits [B, …] what is wanted, of the same shape.
    """
    if size is None:
        inputs = [resize(image_tensor(image), own_size(*image.shape[:2])) for image in images]
    else:
        planes = torch.cat([resize(image_tensor(image), (size, size)) for image in images])
        inputs = planes.split(max(1, _CPU_PIXELS // size**2) if device.type == "cpu" else len(planes))
    found = []
    for part in inputs:
        logits = _logits(model, normalize(part.to(device)))
        if not torch.isfinite(logits).all():
            # As a map or a class it would look like any other.
            raise TrainingError(
                "the model's output for an image is not finite, so there is nothing to measure or to show; "
                "train with a lower rate"
            )
        found += last(logits).cpu()
    return found


def _logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    # Convolutions pass this layout on, and on a CPU CSNet runs in half the time with it. A model that takes views of
    # its features may refuse it.
    try:
        return model(batch.contiguous(memory_format=torch.channels_last)).float()
    except RuntimeError:
        return model(batch).float()
