"""Data sets of images with a target each (a mask or a class), and the tensors that training uses."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prunekit.errors import DataError

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class ImageDataset(ABC):
    """Images with a target each, in a fixed order; subclass :class:`MaskDataset` or :class:`LabelDataset`.

    Attributes:
        names: a unique name per image.
        skipped: the number of images left out because they could not be used.
        skip_errors: drop and count unreadable images instead of raising.
        classes: names of the classes in the order of their labels; empty if the targets are not labels.
        unit: the word for an image with its target in messages.
        targets: the word for the targets in messages.
    """

    skip_errors: bool = False
    classes: tuple[str, ...] = ()
    unit: str
    targets: str

    def __init__(self, names: list[str]):
        self.names = names
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """Return the image: uint8 [H, W, 3], RGB.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def target(self, index: int) -> Any:
        """Return the target of the image.

        Raises:
            DataError: it cannot be read, or is invalid.
        """

    def pair(self, index: int) -> tuple[np.ndarray, Any]:
        """Return image and target; override this if both are produced together."""
        return self.image(index), self.target(index)

    def files(self, index: int) -> Sequence[Path] | None:
        """Return the files that the pair is read from; None if it does not come from files alone."""
        return None

    @abstractmethod
    def empty_targets(self, count: int, size: int) -> torch.Tensor:
        """Return a zero tensor for the targets of ``count`` images of height and width ``size``."""

    @abstractmethod
    def encode_target(self, target: Any, size: int) -> torch.Tensor:
        """Return one target as a row of the tensor of :meth:`empty_targets`."""

    @abstractmethod
    def display_target(self, target: Any) -> np.ndarray | str:
        """Return one target for display: an image, uint8 [H, W], or text."""

    def target_warning(self, targets: torch.Tensor) -> str | None:
        """Return what is suspicious about the targets of the whole set, [N, …] as encoded; None if nothing is."""
        return None

    def drop(self, indices: list[int]) -> None:
        """Remove these images and count them as skipped."""
        gone = set(indices)
        self.names = [name for i, name in enumerate(self.names) if i not in gone]
        self.skipped += len(gone)


class MaskDataset(ImageDataset):
    """Images with their masks."""

    unit, targets = "pairs", "masks"

    @abstractmethod
    def mask(self, index: int) -> np.ndarray:
        """Return the mask: uint8 [H, W] of the size of the image, gray levels 0 to 255.

        Raises:
            DataError: it cannot be read.
        """

    def target(self, index: int) -> np.ndarray:
        return self.mask(index)

    def empty_targets(self, count: int, size: int) -> torch.Tensor:
        return torch.zeros(count, 1, size, size, dtype=torch.uint8)

    def encode_target(self, target: np.ndarray, size: int) -> torch.Tensor:
        return (resize(image_tensor(target), (size, size))[0] >= 127.5).to(torch.uint8)

    def target_warning(self, targets: torch.Tensor) -> str | None:
        levels = targets.flatten(1)
        return mask_warning(levels.amin(1).tolist(), levels.amax(1).tolist())

    def display_target(self, target: np.ndarray) -> np.ndarray:
        return target


def mask_warning(lowest: Sequence[int], highest: Sequence[int]) -> str | None:
    """Return a warning if no mask has both object and background, given the lowest and highest level of each."""
    if not lowest or any(low < high for low, high in zip(lowest, highest, strict=True)):
        return None
    kinds = " or ".join(kind for kind, found in (("full", any(highest)), ("empty", not all(highest))) if found)
    return f"all {len(lowest)} masks are {kinds}; check that they are 255 for object and 0 for background"


class LabelDataset(ImageDataset):
    """Images with a class each.

    Args:
        names: a unique name per image.
        classes: names of the classes; a label is an index into this list.
    """

    unit, targets = "images", "class labels"

    def __init__(self, names: list[str], classes: Sequence[str]):
        super().__init__(names)
        self.classes = tuple(classes)

    @abstractmethod
    def label(self, index: int) -> int:
        """Return the label of the image."""

    def target(self, index: int) -> int:
        label = self.label(index)
        if not 0 <= label < len(self.classes):
            raise DataError(
                f"{self.names[index]} has the label {label}, and the data set has {len(self.classes)} classes "
                f"(0 to {len(self.classes) - 1}); fix the label, or set data.on_error=skip to leave the image out"
            )
        return label

    def empty_targets(self, count: int, size: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def encode_target(self, target: int, size: int) -> torch.Tensor:
        return torch.tensor(target)

    def display_target(self, target: int) -> str:
        return self.classes[target]


@dataclass(frozen=True)
class Tensors:
    """A whole data set in memory at one image size."""

    images: torch.Tensor  # uint8 [N, 3, S, S], RGB
    targets: torch.Tensor  # masks, uint8 [N, 1, S, S] of 0 and 1; or class labels, int64 [N]
    sizes: torch.Tensor  # float32 [N, 2], height and width of each original image in pixels

    def __len__(self) -> int:
        return len(self.images)


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize float [N, C, H, W] to ``size`` (height, width): bilinear, half-pixel centers, no antialiasing, as the
    published evaluation."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=False)


def image_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert a uint8 array [H, W, 3] or [H, W] to float32 [1, C, H, W] without scaling."""
    planes = torch.from_numpy(np.ascontiguousarray(image)).float()
    return planes.permute(2, 0, 1)[None] if planes.ndim == 3 else planes[None, None]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Normalize levels 0 to 255 ([N, 3, H, W]) with the mean and standard deviation of ImageNet; returns float32."""
    mean, deviation = _statistics(images.device)
    return (images.float() / 255 - mean) / deviation


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, (1, 3, 1, 1); cached, since copying to a GPU blocks."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))


def read_pair(pairs: ImageDataset, index: int) -> tuple[np.ndarray, Any]:
    """Return a validated pair of any data set.

    Raises:
        DataError: it cannot be read, or has a wrong type or shape (a float mask of 0 to 1 would train to an empty map).
    """
    image, target = pairs.pair(index)
    wanted = [("image", image, "[H, W, 3]", np.ndim(image) == 3 and np.shape(image)[2] == 3)]
    if isinstance(pairs, MaskDataset):
        wanted.append(("mask", target, f"{list(np.shape(image)[:2])}", np.shape(target) == np.shape(image)[:2]))
    for what, value, shape, fits in wanted:
        kind = getattr(value, "dtype", type(value).__name__)
        if not fits or kind != np.uint8 or not np.size(value):
            raise DataError(
                f"the {what} of {pairs.names[index]} is {kind} {list(np.shape(value))}, but must be uint8 {shape} "
                "with levels 0 to 255; fix the data set that returns it"
            )
    return image, target


def load_tensors(pairs: ImageDataset, size: int) -> Tensors:
    """Read and resize a whole set: images rounded to uint8, masks thresholded at 0.5 after resizing.

    With ``pairs.skip_errors``, unreadable images are dropped and counted in ``pairs.skipped``.

    Raises:
        DataError: the set is empty, no image can be read, or one cannot and ``pairs.skip_errors`` is false.
    """
    if not len(pairs):
        raise DataError("the data set is empty; check data.root and data.val_holdout")
    count = len(pairs)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    targets = pairs.empty_targets(count, size)
    sizes = torch.empty(count, 2)

    def fill(index: int) -> DataError | None:
        try:
            image, target = read_pair(pairs, index)
        except DataError as error:
            return error
        images[index] = resize(image_tensor(image), (size, size))[0].round_().clamp_(0, 255).to(torch.uint8)
        targets[index] = pairs.encode_target(target, size)
        sizes[index] = torch.tensor(image.shape[:2], dtype=torch.float32)
        return None

    # Decoding releases the GIL; each worker writes its own rows, so the result does not depend on their order.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
        errors = {i: error for i, error in enumerate(workers.map(fill, range(count))) if error is not None}
    if errors:
        if not pairs.skip_errors:
            raise next(iter(errors.values()))
        kept = [i for i in range(count) if i not in errors]
        pairs.drop(list(errors))
        if not kept:
            raise DataError(f"none of the {count} {pairs.unit} can be read; the first: {next(iter(errors.values()))}")
        images, targets, sizes = images[kept], targets[kept], sizes[kept]
    return Tensors(images, targets, sizes)
