"""What a task may learn by, other than its own loss: for maps of one logit a pixel.

A registered loss is a function of the task (and of its options, the recipe's); it gives the function of logits and
targets that is called in each step. (A function of both at once was weighed: it would find out in the first step
whether it fits the task, where this one can say so before anything is read.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.config.registry import register_loss
from prunekit.data.datasets import MaskDataset
from prunekit.errors import RecipeError
from prunekit.tasks.base import Task

Loss = Callable[[Tensor, Tensor], Tensor]


@register_loss("task")
def of_task(task: Task) -> Loss:
    """The task's own: binary cross-entropy for maps, cross-entropy for classes."""
    return task.loss


@register_loss("bce_iou")
def bce_iou(task: Task, *, iou: float = 1.0) -> Loss:
    """Binary cross-entropy, and 1 less the soft intersection over union of each map.

    After Qin et al., CVPR 2019, section 3.3, without its third term.

    Args:
        task: with masks as targets.
        iou: the weight of the second term; at least 0.

    Returns:
        of logits [B, 1, H, W] and masks [B, 1, H, W] of 0 … 1 the mean over the batch, a scalar.

    Raises:
        RecipeError: the task has no masks.
        ValueError: a negative weight.
    """
    _needs_masks(task, "bce_iou")
    if iou < 0:
        raise ValueError(f"bce_iou takes iou >= 0, not {iou}")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.float(), targets.float()
        return F.binary_cross_entropy_with_logits(logits, targets) + iou * _iou(logits, targets, None).mean()

    return loss


@register_loss("structure")
def structure(task: Task, *, window: int = 31, gain: float = 5.0, size: int = 352) -> Loss:
    """As bce_iou, with pixels near an outline weighing more.

    After F³Net (Wei et al., AAAI 2020, section 3.3).

    A pixel weighs 1 + gain · |mean of the mask around it - mask|; outside the image the mask is 0 there.

    Args:
        task: with masks as targets.
        window: side of the square over which that mean goes, in pixels of an image of side ``size``; it shrinks with
            the image. Odd.
        gain: at least 0.
        size: side in pixels of the images that ``window`` is meant for.

    Returns:
        of logits [B, 1, H, W] and masks [B, 1, H, W] of 0 … 1 the mean over the batch, a scalar.

    Raises:
        RecipeError: the task has no masks.
        ValueError: an even or too small window, a negative gain, no size.
    """
    _needs_masks(task, "structure")
    if window < 1 or window % 2 == 0 or gain < 0 or size < 1:
        raise ValueError(
            f"structure takes an odd window >= 1, gain >= 0 and size >= 1, not {window}, {gain} and {size}"
        )

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.float(), targets.float()
        side = 2 * round((window * max(targets.shape[-2:]) / size - 1) / 2) + 1
        side = max(3, side) if window > 1 else 1
        near = F.avg_pool2d(targets, side, 1, side // 2)
        weight = 1 + gain * (near - targets).abs()
        crossed = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        crossed = (weight * crossed).sum((2, 3)) / weight.sum((2, 3))
        return (crossed + _iou(logits, targets, weight)).mean()

    return loss


def _iou(logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """1 less the soft intersection over union of each map: [B, C]. With 1 added to both, as published, so that two
    empty maps agree."""
    found = torch.sigmoid(logits)
    weight = torch.ones_like(targets) if weight is None else weight
    both = (found * targets * weight).sum((2, 3))
    either = ((found + targets) * weight).sum((2, 3)) - both
    return 1 - (both + 1) / (either + 1)


def _needs_masks(task: Task, name: str) -> None:
    if not issubclass(task.data, MaskDataset):
        raise RecipeError(
            f"the loss {name} compares maps with masks, and this task learns from {task.data.targets}; "
            "name another, such as: task"
        )
