"""Models with preprocessing and postprocessing in the exported graph: images in, maps or scores out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.data.datasets import DEVIATION, MEAN
from prunekit.errors import ExportError
from prunekit.tasks.base import Task, main_output
from prunekit.tasks.saliency import Saliency


class PreprocessedModel(nn.Module):
    """A model that takes images as they are read from a file.

    Images are resized to a square (bilinear with half-pixel centers, no antialiasing) of ``size`` pixels a side, and
    normalized with ImageNet's mean and standard deviation. The task's ``activation`` is applied to the first output.

    Shape:
        input: (N, H, W, 3) uint8, RGB, any H and W; output: for saliency (N, H, W) uint8 maps, 255 is salient; for
        other tasks the scores, such as (N, K) probabilities.
    """

    def __init__(self, model: nn.Module, task: Task, size: int):
        super().__init__()
        self.model, self.size, self.activation = model, size, task.activation
        self.returns_maps = isinstance(task, Saliency)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        planes = _resize(image.permute(0, 3, 1, 2).float(), (self.size, self.size))
        scores = self.activation(main_output(self.model((planes / 255 - self.mean) / self.deviation)))
        if not self.returns_maps:
            return scores
        maps = _resize(scores, (image.shape[1], image.shape[2]))
        return (maps[:, 0] * 255).clamp(0, 255).floor().to(torch.uint8)


def add_preprocessing(model: nn.Module, task: Task, size: int) -> PreprocessedModel:
    """Add the preprocessing of the run; raise ExportError if the task has a ``postprocess`` of its own."""
    if type(task).postprocess not in (Task.postprocess, Saliency.postprocess):
        raise ExportError(
            f"--preprocess does not support {type(task).__name__}, which overrides postprocess; export without it, and "
            "prepare the images yourself"
        )
    return PreprocessedModel(model, task, size).eval()


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    # Even if the size is the same: the graph must not depend on the size of the example.
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
