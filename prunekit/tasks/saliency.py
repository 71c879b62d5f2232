"""Salient object detection: loss, the published evaluation protocol, and PySODMetrics' figures.

Protocol (Gao et al., ECCV 2020), after what :mod:`prunekit.tasks.base` says of it: the model's logits go through a
sigmoid, the map is resized back the same way, multiplied by 255 and truncated to uint8; the metrics take that map and
the mask as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.config.registry import register_task
from prunekit.data.datasets import MaskDataset, Tensors, normalize, resize
from prunekit.data.mask_folder import folder as folder_pairs
from prunekit.tasks.base import Progress, Result, Task, inference, outputs, passes
from prunekit.tasks.saliency_metrics import SaliencyMetrics
from prunekit.tasks.trivial_predictors import trivial_predictor_scores


@register_task("saliency")
class Saliency(Task):
    """Salient object detection: one logit map, BCE; max F, MAE, S- and E-measure by PySODMetrics."""

    metric_names = ("max_f", "mae", "s_measure", "max_e")
    lower_is_better = frozenset({"mae"})
    data = MaskDataset
    pictures = True

    def fault(self, output: Any, size: int, images: MaskDataset) -> str | None:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        if found == (1, 1, size, size):
            return None
        return (
            f"it needs one map of the image's size, (1, 1, {size}, {size}) for an image of that size, and the model "
            f"gives {found}; name another backbone, or another task"
        )

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean binary cross-entropy of logits [B, 1, H, W] against masks [B, 1, H, W] of 0 and 1: a scalar."""
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float())

    def distance(self, logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Mean binary cross-entropy against the teacher's map, both logits divided by the temperature, times its
        square: a scalar."""
        soft = torch.sigmoid(taught.float() / temperature)
        return temperature**2 * F.binary_cross_entropy_with_logits(logits.float() / temperature, soft)

    def predict(self, model: nn.Module, image: np.ndarray, size: int | None) -> np.ndarray:
        """The saliency map of one image by the published protocol: uint8 [H, W].

        Args:
            model: gives logits [1, 1, h, w] for an input [1, 3, h, w].
            image: uint8 [H, W, 3], RGB.
            size: side of the square that the model sees; None: the image's own size (:func:`own_size`).
        """
        with inference(model) as device:
            return _maps(model, [image], size, device)[0]

    def show(self, prediction: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """The map itself."""
        return prediction

    def quick(self, model: nn.Module, tensors: Tensors, batch_size: int) -> dict[str, float]:
        """``mae`` and ``max_f`` at the tensors' own size, for a look after each epoch.

        Raises:
            DataError: the set is empty.
        """
        meter = SaliencyMetrics(only_quick=True)
        with inference(model) as device:
            for start in range(0, len(tensors), batch_size):
                batch = slice(start, start + batch_size)
                logits = model(normalize(tensors.images[batch].to(device))).float()
                if not torch.isfinite(logits).all():
                    return {}
                scores = torch.sigmoid(logits)
                maps = (scores[:, 0] * 255).to(torch.uint8).cpu().numpy()
                for saliency, mask in zip(maps, tensors.targets[batch, 0].cpu().numpy(), strict=True):
                    meter.add(saliency, mask * np.uint8(255))
        found = meter.metrics()
        return {"mae": found["mae"], "max_f": found["max_f"]}

    def evaluate(
        self,
        model: nn.Module,
        pairs: MaskDataset,
        size: int | None,
        batch_size: int,
        progress: Progress | None = None,
        keep: Sequence[int] = (),
    ) -> Result:
        """All figures of a set by the published protocol, at each image's own size; the errors are each image's MAE.

        The curves are ``precision``, ``recall`` and ``f``, 256 values each; place t holds the figures of the maps cut
        at level 255 - t, so that recall rises.

        Args:
            model: gives logits [B, 1, h, w] for inputs [B, 3, h, w].
            keep: indices (of the set without its unreadable pairs) whose maps are wanted.
            others, and errors: as for :meth:`Task.evaluate`.
        """
        meter, wanted, kept, done = SaliencyMetrics(), set(keep), {}, 0
        with inference(model) as device:
            for batch in passes(pairs, batch_size, progress):
                maps = _maps(model, [image for image, _ in batch], size, device)
                for saliency, (_, mask) in zip(maps, batch, strict=True):
                    meter.add(saliency, mask)
                    if done in wanted:
                        kept[done] = saliency
                    done += 1
        metrics = meter.metrics()
        curves = {key: [float(v) for v in values] for key, values in meter.curves().items()}
        return Result(metrics, curves, meter.per_image_mae, list(pairs.names), kept)

    def reference(self, pairs: MaskDataset) -> dict[str, dict[str, float]]:
        """The metrics of a constant map, a centre prior and a colour threshold; see ``trivial_predictors``."""
        return trivial_predictor_scores(pairs)

    def read_folder(self, folder: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> MaskDataset:
        """All pairs of a folder that holds images/ and GT/."""
        return folder_pairs("val", root=folder, val_root=folder, on_error=on_error)


def _maps(model: nn.Module, images: list[np.ndarray], size: int | None, device: torch.device) -> list[np.ndarray]:
    return [
        (resize(score[None], image.shape[:2])[0, 0] * 255).clamp_(0, 255).to(torch.uint8).numpy()
        for score, image in zip(outputs(model, images, size, device, torch.sigmoid), images, strict=True)
    ]
