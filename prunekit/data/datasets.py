"""Sets of images, each with its target (a mask or a class), and the tensors that training takes from them."""

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
    """Images, each with its target, in a fixed order; made as a :class:`PairSet` or a :class:`LabelSet`.

    Attributes:
        names: one name for each image, unique.
        skipped: how many were left out because they could not be used.
        tolerant: what turns out unreadable is dropped and counted instead of raised.
        classes: what the classes are called, in the order of their labels; empty where targets are no labels.
        unit: what an image with its target is called in messages.
        targets: what the targets are called.
    """

    tolerant: bool = False
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
        """The image: uint8 [H, W, 3], RGB.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def target(self, index: int) -> Any:
        """What is to be found in the image.

        Raises:
            DataError: it cannot be read, or is nothing that the set may hold.
        """

    def pair(self, index: int) -> tuple[np.ndarray, Any]:
        """Image and target together; a set that can make both in one go overrides this."""
        return self.image(index), self.target(index)

    def files(self, index: int) -> Sequence[Path] | None:
        """The files that the pair is read from; None where it does not come from files alone."""
        return None

    @abstractmethod
    def blank(self, count: int, size: int) -> torch.Tensor:
        """Room for the targets of ``count`` images at one size, all zero."""

    @abstractmethod
    def encode(self, target: Any, size: int) -> torch.Tensor:
        """One target as its row of that room."""

    @abstractmethod
    def shown(self, target: Any) -> np.ndarray | str:
        """One target as people look at it: a picture, uint8 [H, W], or a word."""

    def drop(self, indices: list[int]) -> None:
        """Take these out of the set and count them as skipped."""
        gone = set(indices)
        self.names = [name for i, name in enumerate(self.names) if i not in gone]
        self.skipped += len(gone)


class MaskDataset(ImageDataset):
    """Images with their masks."""

    unit, targets = "pairs", "masks"

    @abstractmethod
    def mask(self, index: int) -> np.ndarray:
        """The mask of the image: uint8 [H, W], grey level 0 to 255 as stored, of the image's own size.

        Raises:
            DataError: it cannot be read.
        """

    def target(self, index: int) -> np.ndarray:
        return self.mask(index)

    def blank(self, count: int, size: int) -> torch.Tensor:
        return torch.zeros(count, 1, size, size, dtype=torch.uint8)

    def encode(self, target: np.ndarray, size: int) -> torch.Tensor:
        return (resize(image_tensor(target), (size, size))[0] >= 127.5).to(torch.uint8)

    def shown(self, target: np.ndarray) -> np.ndarray:
        return target


class LabelDataset(ImageDataset):
    """Images that each belong to one of several classes.

    Args:
        names: one name for each image, unique.
        classes: what the classes are called; a label is a place in this list.
    """

    unit, targets = "images", "class labels"

    def __init__(self, names: list[str], classes: Sequence[str]):
        super().__init__(names)
        self.classes = tuple(classes)

    @abstractmethod
    def label(self, index: int) -> int:
        """The label of the image."""

    def target(self, index: int) -> int:
        label = self.label(index)
        if not 0 <= label < len(self.classes):
            raise DataError(
                f"{self.names[index]} has the label {label}, and the data set has {len(self.classes)} classes "
                f"(0 to {len(self.classes) - 1}); mend the label, or set data.on_error=skip to leave it out"
            )
        return label

    def blank(self, count: int, size: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def encode(self, target: int, size: int) -> torch.Tensor:
        return torch.tensor(target)

    def shown(self, target: int) -> str:
        return self.classes[target]


@dataclass(frozen=True)
class Tensors:
    """A whole set in memory, at one size.

    Attributes:
        images: uint8 [N, 3, S, S], RGB.
        targets: masks, uint8 [N, 1, S, S] of 0 and 1; or class labels, int64 [N].
        sizes: float32 [N, 2], height and width of each original image in pixels.
    """

    images: torch.Tensor
    targets: torch.Tensor
    sizes: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Half-pixel bilinear resize without anti-aliasing, as the published evaluation does it.

    Args:
        maps: float [N, C, H, W].
        size: height and width wanted.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=False)


def image_tensor(image: np.ndarray) -> torch.Tensor:
    """A uint8 [H, W, 3] or [H, W] array as float32 [1, C, H, W], levels kept."""
    planes = torch.from_numpy(np.ascontiguousarray(image)).float()
    return planes.permute(2, 0, 1)[None] if planes.ndim == 3 else planes[None, None]


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Levels 0 to 255 (uint8 or float, [N, 3, H, W]) → float32 with ImageNet's mean and deviation taken out."""
    mean, deviation = _statistics(images.device)
    return (images.float() / 255 - mean) / deviation


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, (1, 3, 1, 1); made once, since an accelerator waits for what comes from the CPU."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))


def checked_pair(pairs: ImageDataset, index: int) -> tuple[np.ndarray, Any]:
    """A pair, whoever's set it comes from.

    Raises:
        DataError: it cannot be read, or is not what :class:`ImageSet` says: a mask of 0 to 1 in float, say, would train
            a model towards nothing.
    """
    image, target = pairs.pair(index)
    wanted = [("image", image, "[H, W, 3]", np.ndim(image) == 3 and np.shape(image)[2] == 3)]
    if isinstance(pairs, MaskDataset):
        wanted.append(("mask", target, f"{list(np.shape(image)[:2])}", np.shape(target) == np.shape(image)[:2]))
    for what, value, shape, fits in wanted:
        kind = getattr(value, "dtype", type(value).__name__)
        if not fits or kind != np.uint8 or not np.size(value):
            raise DataError(
                f"the {what} of {pairs.names[index]} is {kind} {list(np.shape(value))}, and has to be uint8 {shape} "
                "with levels 0 to 255; mend the data set that gives it"
            )
    return image, target


def load_tensors(pairs: ImageDataset, size: int) -> Tensors:
    """Read a whole set and resize it: images rounded to uint8, masks thresholded at one half after the resize.

    A tolerant set loses here what cannot be read (``pairs.skipped`` counts it).

    Raises:
        DataError: the set is empty, or something cannot be read and the set is not tolerant.
    """
    if not len(pairs):
        raise DataError("the data set is empty; check data.root and data.val_holdout")
    count = len(pairs)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    targets = pairs.blank(count, size)
    sizes = torch.empty(count, 2)

    def fill(index: int) -> DataError | None:
        try:
            image, target = checked_pair(pairs, index)
        except DataError as error:
            return error
        images[index] = resize(image_tensor(image), (size, size))[0].round_().clamp_(0, 255).to(torch.uint8)
        targets[index] = pairs.encode(target, size)
        sizes[index] = torch.tensor(image.shape[:2], dtype=torch.float32)
        return None

    # Decoding releases the GIL; every worker writes its own rows, so the result does not depend on their order.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers:
        errors = {i: error for i, error in enumerate(workers.map(fill, range(count))) if error is not None}
    if errors:
        if not pairs.tolerant:
            raise next(iter(errors.values()))
        kept = [i for i in range(count) if i not in errors]
        pairs.drop(list(errors))
        if not kept:
            raise DataError(f"none of the {count} {pairs.unit} can be read; the first: {next(iter(errors.values()))}")
        images, targets, sizes = images[kept], targets[kept], sizes[kept]
    return Tensors(images, targets, sizes)
