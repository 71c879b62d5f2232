"""Metrics of salient object detection by PySODMetrics, as published figures use it.

It stretches each map to the range 0 … 255 (a constant map stays as it is) and takes mask levels above 128 as salient.
"""

from __future__ import annotations

import warnings

import numpy as np

from prunekit.data.datasets import mask_warning
from prunekit.tasks.base import Metrics

BETA_SQUARED = 0.3


class SaliencyMetrics(Metrics):
    """Max F, MAE, S- and E-measure of a data set; the error of an image is its MAE.

    Args:
        quick: leave out the S- and E-measure, which take most of the time.
    """

    def __init__(self, quick: bool = False):
        # Imported here, since it imports OpenCV and scikit-image.
        import py_sod_metrics

        with warnings.catch_warnings():
            # Fmeasure is deprecated, but its replacement computes no set-mean precision and recall in one pass.
            warnings.simplefilter("ignore")
            self._f = py_sod_metrics.Fmeasure(beta=BETA_SQUARED)
        self._levels: list[tuple[int, int]] = []  # of each mask
        self._mae = py_sod_metrics.MAE()
        self._s = None if quick else py_sod_metrics.Smeasure()
        if self._s is not None:
            # The quarters below or right of an object at the edge are empty, with weight 0.
            ssim, self._s.ssim = self._s.ssim, lambda pred, gt: ssim(pred, gt) if pred.size else 0.0
        self._e = None if quick else py_sod_metrics.Emeasure()

    def update(self, prediction: np.ndarray, target: np.ndarray) -> None:
        """Add a map and its mask, both uint8 [H, W]."""
        for measure in (self._f, self._mae, self._s, self._e):
            if measure is not None:
                measure.step(prediction, target)
        self._levels.append((int(target.min() > 128), int(target.max() > 128)))

    def warning(self) -> str | None:
        return mask_warning(*zip(*self._levels, strict=True)) if self._levels else None

    @property
    def errors(self) -> list[float]:
        return [float(value) for value in self._mae.maes]

    def curves(self) -> dict[str, list[float]]:
        """Return ``precision``, ``recall`` (means over the images) and their F-measure ``f``, 256 values each.

        Value t is for maps binarized at level 255 - t, so recall increases.
        """
        means = self._f.get_results()["pr"]
        precision, recall = means["p"], means["r"]
        total = BETA_SQUARED * precision + recall
        f = np.divide((1 + BETA_SQUARED) * precision * recall, total, out=np.zeros_like(total), where=total > 0)
        return {"precision": precision.tolist(), "recall": recall.tolist(), "f": f.tolist()}

    def compute(self) -> dict[str, float]:
        metrics = {"max_f": max(self.curves()["f"]), "mae": float(self._mae.get_results()["mae"])}
        if self._s is not None:
            metrics["s_measure"] = float(self._s.get_results()["sm"])
            # PySODMetrics divides by the number of pixels - 1, so that perfect maps exceed 1.
            metrics["max_e"] = float(np.minimum(self._e.changeable_ems, 1).mean(0).max())
        return metrics
