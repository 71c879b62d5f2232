"""Sets of (image, mask) pairs, and the tensors that training takes from them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from prunekit.errors import DataError

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class PairSet(ABC):
    """Images with their masks, in a fixed order.

    Attributes:
        names: one name for each pair, unique.
        skipped: how many pairs were left out because they could not be used.
        tolerant: a pair that turns out unreadable is dropped and counted instead of raised.
    """

    tolerant: bool = False

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
    def mask(self, index: int) -> np.ndarray:
        """The mask of the image: uint8 [H, W], grey level 0 to 255 as stored, of the image's own size.

        Raises:
            DataError: it cannot be read.
        """

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask together; a set that can make both in one go overrides this."""
        return self.image(index), self.mask(index)

    def drop(self, indices: list[int]) -> None:
        """Take these pairs out of the set and count them as skipped."""
        gone = set(indices)
        self.names = [name for i, name in enumerate(self.names) if i not in gone]
        self.skipped += len(gone)


@dataclass(frozen=True)
class Tensors:
    """A whole set in memory, at one size.

    Attributes:
        images: uint8 [N, 3, S, S], RGB.
        masks: uint8 [N, 1, S, S], 0 or 1.
        sizes: float32 [N, 2], height and width of each original image in pixels.
    """

    images: torch.Tensor
    masks: torch.Tensor
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
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / deviation


def load_tensors(pairs: PairSet, size: int) -> Tensors:
    """Read a whole set and resize it: images rounded to uint8, masks thresholded at one half after the resize.

    A tolerant set loses its unreadable pairs here (``pairs.skipped`` counts them).

    Raises:
        DataError: the set is empty, or a pair cannot be read and the set is not tolerant.
    """
    if not len(pairs):
        raise DataError("the data set is empty; check data.root and data.val_holdout")
    count = len(pairs)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, 1, size, size, dtype=torch.uint8)
    sizes = torch.empty(count, 2)

    def fill(index: int) -> DataError | None:
        try:
            image, mask = pairs.pair(index)
        except DataError as error:
            return error
        images[index] = resize(image_tensor(image), (size, size))[0].round_().clamp_(0, 255).to(torch.uint8)
        masks[index] = (resize(image_tensor(mask), (size, size))[0] >= 127.5).to(torch.uint8)
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
            raise DataError(f"none of the {count} pairs can be read; the first: {next(iter(errors.values()))}")
        images, masks, sizes = images[kept], masks[kept], sizes[kept]
    return Tensors(images, masks, sizes)
