"""Saliency predictors that need no training; a data set on which they score well says little about a model."""

from __future__ import annotations

import numpy as np

from prunekit.data.datasets import MaskDataset
from prunekit.tasks.base import compute_metrics, iterate_batches
from prunekit.tasks.saliency_metrics import SaliencyMetrics


def constant_map(image: np.ndarray) -> np.ndarray:
    """Return a map of 255, uint8 [H, W]."""
    return np.full(image.shape[:2], 255, np.uint8)


def center_prior(image: np.ndarray, sigma: float = 0.25) -> np.ndarray:
    """Return a centered Gaussian, uint8 [H, W]; ``sigma`` is relative to each side."""
    height, width = image.shape[:2]
    rows = ((np.arange(height) + 0.5) / height - 0.5) / sigma
    columns = ((np.arange(width) + 0.5) / width - 0.5) / sigma
    return (255 * np.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / 2)).astype(np.uint8)


def color_distance(image: np.ndarray) -> np.ndarray:
    """Return each pixel's RGB distance from the mean of the border, scaled to at most 255, uint8 [H, W]."""
    levels = image.astype(np.float64)
    width = max(1, round(min(image.shape[:2]) * 0.05))
    border = np.ones(image.shape[:2], bool)
    border[width:-width, width:-width] = False
    distance = np.linalg.norm(levels - levels[border].mean(0), axis=-1)
    return np.rint(255 * distance / max(distance.max(), 1e-9)).astype(np.uint8)


def otsu(saliency: np.ndarray) -> np.ndarray:
    """Return a map binarized at Otsu's threshold (1979): uint8 [H, W] of 0 and 255."""
    counts = np.bincount(saliency.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * np.arange(256))
    gap = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    return np.where(saliency > np.argmax(below * above * gap**2), np.uint8(255), np.uint8(0))


def trivial_predictor_scores(images: MaskDataset) -> dict[str, dict[str, float]]:
    """Return the saliency metrics of three predictors: ``constant``, ``centre`` and ``colour``.

    For ``colour``, each metric is the better of the distance map and the same map binarized by Otsu's method.

    Raises:
        DataError: the data set is empty, or a pair is unreadable.
    """
    metrics = {name: SaliencyMetrics() for name in ("constant", "centre", "colour", "binarized")}
    for ((image, mask),) in iterate_batches(images, 1):
        distance = color_distance(image)
        maps = constant_map(image), center_prior(image), distance, otsu(distance)
        for one, saliency in zip(metrics.values(), maps, strict=True):
            one.update(saliency, mask)
    scores = {name: compute_metrics(one) for name, one in metrics.items()}
    binarized = scores.pop("binarized")
    for key, value in scores["colour"].items():
        scores["colour"][key] = (min if key == "mae" else max)(value, binarized[key])
    return scores
