"""Handwritten digits bundled with scikit-learn: real scans, no download.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998: 1,797 digits of
13 people, 8×8 pixels with 17 gray levels, white on black.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from prunekit.config.registry import register_dataset
from prunekit.data.datasets import LabelDataset
from prunekit.errors import DataError

HELD_OUT = 5  # every fifth image of a class is for validation


class Digits(LabelDataset):
    """The scans of one split; see :func:`digits`."""

    def __init__(self, numbers: np.ndarray, images: np.ndarray, labels: np.ndarray):
        super().__init__([f"{number:04d}" for number in numbers], [str(digit) for digit in range(10)])
        self._images, self._labels = images, labels

    def image(self, index: int) -> np.ndarray:
        # Indexed by name, since images may have been dropped.
        levels = np.rint(self._images[int(self.names[index])] * (255 / 16)).astype(np.uint8)
        return np.repeat(levels[..., None], 3, axis=-1)

    def label(self, index: int) -> int:
        return int(self._labels[int(self.names[index])])


@register_dataset("digits")
def digits(split: Literal["train", "val"]) -> LabelDataset:
    """Handwritten digits of 8×8 pixels, bundled with scikit-learn: 1,442 for training, 355 for validation.

    Args:
        split: ``val`` is every fifth scan of each digit in file order, ``train`` the others.

    Raises:
        DataError: an unknown split.
    """
    if split not in ("train", "val"):
        raise DataError(f"digits has no split {split!r}; use train or val")
    # Imported late, since listing the data sets does not need it.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    held = np.zeros(len(labels), bool)
    for digit in range(10):
        held[np.flatnonzero(labels == digit)[HELD_OUT - 1 :: HELD_OUT]] = True
    return Digits(np.flatnonzero(held == (split == "val")), images.reshape(-1, 8, 8), labels)
