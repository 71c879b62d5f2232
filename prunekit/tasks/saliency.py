"""Salient object detection: loss, the published evaluation protocol, and PySODMetrics' figures.

Protocol (Gao et al., ECCV 2020): the RGB image in 0 … 1 is resized (half-pixel bilinear, no anti-aliasing), ImageNet's
mean and deviation are taken out, the model's logits go through a sigmoid, the map is resized back the same way,
multiplied by 255 and truncated to uint8; the metrics take that map and the mask as stored.

PySODMetrics itself stretches each map to its own least and greatest level before it measures (a constant map stays as
it is), and takes as object what is above 128 in the mask. The published figures come from it as it stands, so ours do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.data.pairs import PairSet, Tensors, image_tensor, normalise, resize
from prunekit.errors import DataError
from prunekit.registry import register_task

BETA_SQUARED = 0.3
# At its own size an image's sides are rounded up to what a network with four halvings divides evenly.
OWN_SIZE_MULTIPLE = 16
# Pixels in one forward pass on a CPU. Larger ones spend as much time on fetching memory as on computing: CSNet ×2 at
# 224×224 on one core takes 383 ms an image in batches of 16, and 215 ms in batches of 4.
_CPU_PIXELS = 4 * 224 * 224


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        metrics: ``max_f``, ``mae``, ``s_measure``, ``max_e``.
        curves: ``precision``, ``recall`` and ``f``, 256 values each; place t holds the figures of the maps cut at level
            255 - t, so that recall rises.
        per_image_mae: one value for each image, in the set's order.
        names: the set's names, in the same order.
        maps: uint8 [H, W] maps of the indices asked for.
    """

    metrics: dict[str, float]
    curves: dict[str, list[float]]
    per_image_mae: list[float]
    names: list[str] = field(default_factory=list)
    maps: dict[int, np.ndarray] = field(default_factory=dict)


class Meter:
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


@register_task("saliency")
class Saliency:
    """Salient object detection: one logit map, BCE; max F, MAE, S- and E-measure by PySODMetrics."""

    metric_names = ("max_f", "mae", "s_measure", "max_e")
    out_channels = 1

    def loss(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Mean binary cross-entropy of logits [B, 1, H, W] against masks [B, 1, H, W] of 0 and 1: a scalar."""
        return F.binary_cross_entropy_with_logits(logits.float(), masks.float())

    def predict(self, model: nn.Module, image: np.ndarray, size: int | None) -> np.ndarray:
        """The saliency map of one image by the published protocol.

        Args:
            model: gives logits [1, 1, h, w] for an input [1, 3, h, w].
            image: uint8 [H, W, 3], RGB.
            size: side of the square that the model sees; None: the image's own size (:func:`own_size`).

        Returns:
            uint8 [H, W].
        """
        with _inference(model) as device:
            return _maps(model, [image], size, device)[0]

    def quick(self, model: nn.Module, tensors: Tensors, batch_size: int) -> dict[str, float]:
        """``mae`` and ``max_f`` at the tensors' own size, for a look after each epoch.

        Raises:
            DataError: the set is empty.
        """
        meter = Meter(only_quick=True)
        with _inference(model) as device:
            for start in range(0, len(tensors), batch_size):
                batch = slice(start, start + batch_size)
                scores = torch.sigmoid(model(normalise(tensors.images[batch].to(device))).float())
                maps = (scores[:, 0] * 255).to(torch.uint8).cpu().numpy()
                for saliency, mask in zip(maps, tensors.masks[batch, 0].cpu().numpy(), strict=True):
                    meter.add(saliency, mask * np.uint8(255))
        found = meter.metrics()
        return {"mae": found["mae"], "max_f": found["max_f"]}

    def evaluate(
        self,
        model: nn.Module,
        pairs: PairSet,
        size: int | None,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
        keep: Sequence[int] = (),
    ) -> Result:
        """All figures of a set by the published protocol, at each image's own size.

        Args:
            model: gives logits [B, 1, h, w] for inputs [B, 3, h, w].
            pairs: the set; if tolerant, it loses its unreadable pairs.
            size: side of the square that the model sees; None: each image's own size (:func:`own_size`), one at a time.
            batch_size: images in hand at once, and the most in one forward pass.
            progress: called with (images done, images in all) after each batch.
            keep: indices (of the set without its unreadable pairs) whose maps are wanted.

        Raises:
            DataError: the set is empty, or a pair cannot be read and the set is not tolerant.
        """
        meter, wanted, kept, dropped, done = Meter(), set(keep), {}, [], 0
        with _inference(model) as device:
            for start in range(0, len(pairs), batch_size):
                batch = []
                for index in range(start, min(start + batch_size, len(pairs))):
                    try:
                        batch.append(pairs.pair(index))
                    except DataError:
                        if not pairs.tolerant:
                            raise
                        dropped.append(index)
                maps = _maps(model, [image for image, _ in batch], size, device) if batch else []
                for saliency, (_, mask) in zip(maps, batch, strict=True):
                    meter.add(saliency, mask)
                    if done in wanted:
                        kept[done] = saliency
                    done += 1
                if progress is not None:
                    progress(min(start + batch_size, len(pairs)), len(pairs))
        pairs.drop(dropped)
        metrics = meter.metrics()
        curves = {key: [float(v) for v in values] for key, values in meter.curves().items()}
        return Result(metrics, curves, meter.per_image_mae, list(pairs.names), kept)


@contextmanager
def _inference(model: nn.Module) -> Iterator[torch.device]:
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


def _maps(model: nn.Module, images: list[np.ndarray], size: int | None, device: torch.device) -> list[np.ndarray]:
    if size is None:
        inputs = [resize(image_tensor(image), own_size(*image.shape[:2])) for image in images]
    else:
        planes = torch.cat([resize(image_tensor(image), (size, size)) for image in images])
        inputs = planes.split(max(1, _CPU_PIXELS // size**2) if device.type == "cpu" else len(planes))
    scores = [score for part in inputs for score in torch.sigmoid(_logits(model, normalise(part.to(device)))).cpu()]
    return [
        (resize(score[None], image.shape[:2])[0, 0] * 255).clamp_(0, 255).to(torch.uint8).numpy()
        for score, image in zip(scores, images, strict=True)
    ]


def _logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    # Convolutions pass this layout on, and on a CPU CSNet runs in half the time with it. A model that takes views of
    # its features may refuse it.
    try:
        return model(batch.contiguous(memory_format=torch.channels_last)).float()
    except RuntimeError:
        return model(batch).float()
