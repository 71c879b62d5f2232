"""A model with all that stands around it by the published protocol inside one graph: pictures in, maps out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data.datasets import DEVIATION, MEAN
from prunekit.errors import ExportError
from prunekit.tasks.base import Task
from prunekit.tasks.classification import Classification
from prunekit.tasks.saliency import Saliency


class FromImages(nn.Module):
    """A model behind its preprocessing.

    The images are resized to a square (half-pixel bilinear, no anti-aliasing), ImageNet's mean and deviation are taken
    out, and the model's logits become what its task gives (:meth:`finish`).

    Args:
        model: takes (N, 3, size, size) float32.
        size: side of that square, in pixels.

    Shape:
        input: (N, H, W, 3) uint8, RGB, any H and W.
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        planes = _resized(image.permute(0, 3, 1, 2).float(), (self.size, self.size))
        return self.finish(self.model((planes / 255 - self.mean) / self.deviation), image)

    def finish(self, logits: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError


class MapFromImages(FromImages):
    """Saliency: (N, H, W) uint8 maps at the images' own size, 255 for what is salient."""

    def finish(self, logits: Tensor, image: Tensor) -> Tensor:
        maps = _resized(torch.sigmoid(logits), (image.shape[1], image.shape[2]))
        return (maps[:, 0] * 255).clamp(0, 255).floor().to(torch.uint8)


class ProbabilitiesFromImages(FromImages):
    """Classification: (N, K) float32, the probability of each class."""

    def finish(self, logits: Tensor, image: Tensor) -> Tensor:
        return torch.softmax(logits, 1)


def add_preprocessing(model: nn.Module, task: Task, size: int) -> FromImages:
    """The model behind its preprocessing and in front of what its task makes of the logits.

    Raises:
        ExportError: nothing is known of the task's output.
    """
    for kind, form in ((Saliency, MapFromImages), (Classification, ProbabilitiesFromImages)):
        if isinstance(task, kind):
            return form(model, size).eval()
    raise ExportError(
        f"--preprocess knows saliency and classification, not {type(task).__name__}; export without it, and prepare "
        "the images outside"
    )


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    # Always, also to the same size: the graph must not depend on the example's.
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
