"""What trivial predictors reach: the floor that a trained saliency model has to leave far below.

A set on which a constant map, a prior for the centre or a threshold on colour does well shows nothing about a model.
"""

from __future__ import annotations

import numpy as np

from prunekit.data.datasets import MaskDataset
from prunekit.tasks.base import passes
from prunekit.tasks.saliency_metrics import SaliencyMetrics


def constant(image: np.ndarray) -> np.ndarray:
    """Everything is salient: uint8 [H, W] of 255."""
    return np.full(image.shape[:2], 255, np.uint8)


def centre(image: np.ndarray, spread: float = 0.25) -> np.ndarray:
    """A Gaussian in the middle of the image, its deviation ``spread`` of each side: uint8 [H, W]."""
    height, width = image.shape[:2]
    rows = ((np.arange(height) + 0.5) / height - 0.5) / spread
    columns = ((np.arange(width) + 0.5) / width - 0.5) / spread
    return (255 * np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / 2)).astype(np.uint8)


def colour_distance(image: np.ndarray) -> np.ndarray:
    """Distance of each pixel's RGB from the mean of the image's border, the farthest at 255: uint8 [H, W]."""
    levels = image.astype(np.float64)
    band = max(1, round(min(image.shape[:2]) * 0.05))
    edge = np.ones(image.shape[:2], bool)
    edge[band:-band, band:-band] = False
    distance = np.linalg.norm(levels - levels[edge].mean(0), axis=-1)
    return np.rint(255 * distance / max(distance.max(), 1e-9)).astype(np.uint8)


def otsu(saliency: np.ndarray) -> np.ndarray:
    """A map cut in two at the level that best parts its histogram (Otsu, 1979): uint8 [H, W] of 0 and 255."""
    counts = np.bincount(saliency.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * np.arange(256))
    gap = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    return np.where(saliency > np.argmax(below * above * gap**2), np.uint8(255), np.uint8(0))


def trivial_predictor_scores(pairs: MaskDataset) -> dict[str, dict[str, float]]:
    """The saliency metrics of three trivial predictors on a set.

    Args:
        pairs: the set; if tolerant, it loses its unreadable pairs.

    Returns:
        ``constant``, ``centre`` and ``colour`` → ``max_f``, ``mae``, ``s_measure``, ``max_e``. For colour, each figure
        is the better of the distance map and the same map cut by Otsu's method.

    Raises:
        DataError: the set is empty, or a pair cannot be read and the set is not tolerant.
    """
    meters = {name: SaliencyMetrics() for name in ("constant", "centre", "colour", "cut")}
    for ((image, mask),) in passes(pairs, 1):
        distance = colour_distance(image)
        maps = {"constant": constant(image), "centre": centre(image), "colour": distance, "cut": otsu(distance)}
        for name, saliency in maps.items():
            meters[name].add(saliency, mask)
    found = {name: meter.metrics() for name, meter in meters.items()}
    cut = found.pop("cut")
    found["colour"] = {key: (min if key == "mae" else max)(value, cut[key]) for key, value in found["colour"].items()}
    return found
