"""Losses that a recipe may name instead of the task's own.

A registered loss takes the task and the recipe's options, so it can refuse a task before data is read; it returns a
function of logits and targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.config.registry import register_loss
from prunekit.data.datasets import MaskDataset, resize
from prunekit.errors import RecipeError
from prunekit.tasks.base import Task, all_outputs
from prunekit.utils.text import plural

Loss = Callable[[Tensor, Tensor], Tensor]


def total_loss(loss: Loss, weights: Sequence[float] = ()) -> Callable[[Any, Tensor], Tensor]:
    """Return a loss of all outputs of a model: the weighted sum (deep supervision: Lee et al., AISTATS 2015).

    Args:
        loss: of one output. Maps of another size are resized to that of the masks.
        weights: of each output; 1 each where empty.

    Raises:
        RecipeError: when called, the number of outputs is not that of the weights.
    """

    def total(outputs: Any, targets: Tensor) -> Tensor:
        outputs = all_outputs(outputs)
        if weights and len(weights) != len(outputs):
            raise RecipeError(
                f"output_weights has {plural(len(weights), 'weight')}, and the model returns "
                f"{plural(len(outputs), 'output')} in training; give as many"
            )
        losses = []
        for output in outputs:
            if output.ndim == targets.ndim == 4 and output.shape[-2:] != targets.shape[-2:]:
                output = resize(output.float(), targets.shape[-2:])
            losses.append(loss(output, targets))
        return sum(w * one for w, one in zip(weights, losses, strict=True)) if weights else sum(losses[1:], losses[0])

    return total


@register_loss("task")
def task_loss(task: Task) -> Loss:
    """The task's own loss: binary cross-entropy for maps, cross-entropy for classes."""
    return task.loss


@register_loss("bce_iou")
def bce_iou(task: Task, *, iou: float = 1.0) -> Loss:
    """Binary cross-entropy plus 1 - soft IoU of each map (BASNet, Qin et al., CVPR 2019, section 3.3, without SSIM).

    Args:
        task: with masks as targets.
        iou: weight of the IoU term, at least 0.

    Returns:
        a function of logits [B, 1, H, W] and masks of 0 … 1, [B, 1, H, W]: the mean over the batch.

    Raises:
        RecipeError: the task has no masks.
        ValueError: a negative weight.
    """
    _require_masks(task, "bce_iou")
    if iou < 0:
        raise ValueError(f"bce_iou: iou={iou} must be at least 0")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.float(), targets.float()
        ones = torch.ones_like(targets)
        return F.binary_cross_entropy_with_logits(logits, targets) + iou * _iou_loss(logits, targets, ones).mean()

    return loss


@register_loss("structure")
def structure(task: Task, *, window: int = 31, gain: float = 5.0, size: int = 352) -> Loss:
    """Like bce_iou, with larger weights near outlines (F³Net, Wei et al., AAAI 2020, section 3.3).

    The weight of a pixel is 1 + gain · |local mean of the mask - mask|, with zeros outside the image.

    Args:
        task: with masks as targets.
        window: odd side of the local mean in pixels of an image of side ``size``; it scales with the image.
        gain: at least 0.
        size: see ``window``.

    Returns:
        a function of logits [B, 1, H, W] and masks of 0 … 1, [B, 1, H, W]: the mean over the batch.

    Raises:
        RecipeError: the task has no masks.
        ValueError: an option is out of range.
    """
    _require_masks(task, "structure")
    if window < 1 or window % 2 == 0 or gain < 0 or size < 1:
        raise ValueError(
            f"structure: window={window} must be odd and at least 1, gain={gain} at least 0, size={size} at least 1"
        )

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.float(), targets.float()
        side = 2 * round((window * max(targets.shape[-2:]) / size - 1) / 2) + 1
        side = max(3, side) if window > 1 else 1
        local_mean = F.avg_pool2d(targets, side, 1, side // 2)
        weight = 1 + gain * (local_mean - targets).abs()
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        bce = (weight * bce).sum((2, 3)) / weight.sum((2, 3))
        return (bce + _iou_loss(logits, targets, weight)).mean()

    return loss


def _iou_loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return 1 - soft IoU of each map, [B, C]; smoothed by 1 as published, so that two empty maps agree."""
    scores = torch.sigmoid(logits)
    intersection = (scores * targets * weight).sum((2, 3))
    union = ((scores + targets) * weight).sum((2, 3)) - intersection
    return 1 - (intersection + 1) / (union + 1)


def _require_masks(task: Task, name: str) -> None:
    if not issubclass(task.dataset_type, MaskDataset):
        raise RecipeError(
            f"the loss {name} compares maps with masks, and this task learns from {task.dataset_type.targets}; set "
            "loss: task"
        )
