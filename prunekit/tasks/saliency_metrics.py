"""The figures of salient object detection, by PySODMetrics.

It stretches each map to its own least and greatest level before it measures (a constant map stays as it is), and takes
as object what is above 128 in the mask. The published figures come from it as it stands, so ours do.
"""

from __future__ import annotations

import warnings

import numpy as np

from prunekit.errors import DataError

BETA_SQUARED = 0.3


class SaliencyMetrics:
    """Collects maps and masks, and gives the set's figures by PySODMetrics.

    Args:
        only_quick: leave out the S- and the E-measure, which take most of the time.
    """

    def __init__(self, only_quick: bool = False):
        # Imported here: OpenCV and scikit-image come with it, and listing the tasks needs neither.
        import py_sod_metrics

        with warnings.catch_warnings():
            # Fmeasure says that it will be replaced; its replacement gives no set-mean precision and recall in one go.
            warnings.simplefilter("ignore")
            self._f = py_sod_metrics.Fmeasure(beta=BETA_SQUARED)
        self._mae = py_sod_metrics.MAE()
        self._s = None if only_quick else py_sod_metrics.Smeasure()
        self._e = None if only_quick else py_sod_metrics.Emeasure()

    def add(self, saliency: np.ndarray, mask: np.ndarray) -> None:
        """Take in one map and its mask, both uint8 [H, W]."""
        for measure in (self._f, self._mae, self._s, self._e):
            if measure is not None:
                measure.step(saliency, mask)

    @property
    def per_image_mae(self) -> list[float]:
        return [float(value) for value in self._mae.maes]

    def curves(self) -> dict[str, np.ndarray]:
        """Precision and recall averaged over the set, and the F-measure of those averages: float [256] each."""
        means = self._f.get_results()["pr"]
        precision, recall = means["p"], means["r"]
        bottom = BETA_SQUARED * precision + recall
        f = np.divide((1 + BETA_SQUARED) * precision * recall, bottom, out=np.zeros_like(bottom), where=bottom > 0)
        return {"precision": precision, "recall": recall, "f": f}

    def metrics(self) -> dict[str, float]:
        """The set's figures.

        Raises:
            DataError: nothing was added.
        """
        if not self._mae.maes:
            raise DataError("there is no image to evaluate; check data.val_root and data.val_holdout")
        found = {"max_f": float(self.curves()["f"].max()), "mae": float(self._mae.get_results()["mae"])}
        if self._s is not None:
            found["s_measure"] = float(self._s.get_results()["sm"])
            found["max_e"] = float(self._e.get_results()["em"]["curve"].max())
        return found
