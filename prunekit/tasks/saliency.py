"""Salient object detection: a map of probabilities for each image.

Protocol (Gao et al., ECCV 2020), after the steps in :mod:`prunekit.tasks.base`: sigmoid, bilinear resize to the image's
size, times 255, truncated to uint8; PySODMetrics compares that map with the mask as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.config.registry import register_task
from prunekit.data.datasets import MaskDataset, resize
from prunekit.data.mask_folder import folder as read_mask_folder
from prunekit.tasks.base import Task
from prunekit.tasks.saliency_metrics import SaliencyMetrics
from prunekit.tasks.trivial_predictors import trivial_predictor_scores


@register_task("saliency")
class Saliency(Task):
    """Salient object detection: a logit per pixel, BCE; max F, MAE, S- and E-measure by PySODMetrics."""

    metric_names = ("max_f", "mae", "s_measure", "max_e")
    lower_is_better = frozenset({"mae"})
    dataset_type = MaskDataset
    predicts_images = True
    takes_logits = True

    def check_output(self, output: Any, size: int, images: MaskDataset) -> str | None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape == (1, 1, size, size):
            return None
        return (
            f"the model must return a map of shape (1, 1, {size}, {size}) for an image of that size, not {shape}; "
            "choose another backbone or task"
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of logits [B, 1, S, S] and masks of 0 and 1, [B, 1, S, S]."""
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float())

    def distillation_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        """Return temperature² times the binary cross-entropy with the teacher's map; logits are [B, 1, S, S]."""
        soft = torch.sigmoid(teacher_logits.float() / temperature)
        return temperature**2 * F.binary_cross_entropy_with_logits(logits.float() / temperature, soft)

    def make_metrics(self, classes: Sequence[str] = (), quick: bool = False) -> SaliencyMetrics:
        return SaliencyMetrics(quick)

    def activation(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def postprocess(self, scores: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Return the saliency map, uint8 [H, W], from probabilities [1, h, w]."""
        return (resize(scores[None], size)[0, 0] * 255).clamp_(0, 255).to(torch.uint8).numpy()

    def decode_target(self, target: Tensor) -> np.ndarray:
        return target[0].numpy() * np.uint8(255)

    def trivial_scores(self, images: MaskDataset) -> dict[str, dict[str, float]]:
        """Return the metrics of a constant map, a center prior and a color threshold."""
        return trivial_predictor_scores(images)

    def read_folder(self, folder: str, on_error: Literal["raise", "skip"], classes: Sequence[str]) -> MaskDataset:
        """Read a folder that holds ``images/`` and ``GT/``."""
        return read_mask_folder("val", root=folder, val_root=folder, on_error=on_error)
