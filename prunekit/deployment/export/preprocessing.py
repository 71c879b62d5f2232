"""Models with preprocessing and postprocessing in the exported graph: images in, maps or probabilities out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data.datasets import DEVIATION, MEAN
from prunekit.errors import ExportError
from prunekit.tasks.base import Task
from prunekit.tasks.classification import Classification
from prunekit.tasks.saliency import Saliency


class PreprocessedModel(nn.Module):
    """A model that takes images as they are read from a file.

    Images are resized to a square (bilinear with half-pixel centers, no antialiasing) and normalized with ImageNet's
    mean and standard deviation.

    Args:
        model: takes (N, 3, size, size) float32.
        size: side of the square in pixels.

    Shape:
        input: (N, H, W, 3) uint8, RGB, any H and W.
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        planes = _resize(image.permute(0, 3, 1, 2).float(), (self.size, self.size))
        return self.postprocess(self.model((planes / 255 - self.mean) / self.deviation), image)

    def postprocess(self, logits: Tensor, image: Tensor) -> Tensor:
        raise NotImplementedError


class PreprocessedSaliency(PreprocessedModel):
    """Returns (N, H, W) uint8 maps of the images' own size; 255 is salient."""

    def postprocess(self, logits: Tensor, image: Tensor) -> Tensor:
        maps = _resize(torch.sigmoid(logits), (image.shape[1], image.shape[2]))
        return (maps[:, 0] * 255).clamp(0, 255).floor().to(torch.uint8)


class PreprocessedClassification(PreprocessedModel):
    """Returns (N, K) float32 probabilities of the classes."""

    def postprocess(self, logits: Tensor, image: Tensor) -> Tensor:
        return torch.softmax(logits, 1)


def add_preprocessing(model: nn.Module, task: Task, size: int) -> PreprocessedModel:
    """Add the preprocessing of the run, and the postprocessing of its task.

    Raises:
        ExportError: the task is neither saliency nor classification.
    """
    for kind, wrapper in ((Saliency, PreprocessedSaliency), (Classification, PreprocessedClassification)):
        if isinstance(task, kind):
            return wrapper(model, size).eval()
    raise ExportError(
        f"--preprocess supports saliency and classification, not {type(task).__name__}; export without it, and "
        "prepare the images yourself"
    )


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    # Even if the size is the same: the graph must not depend on the size of the example.
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
