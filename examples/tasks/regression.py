"""Regression of one number per image as a prunekit task, with a generated data set and a small network.

prunekit run examples/tasks/regression.yaml
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import register_dataset, register_task
from prunekit.data.datasets import ImageDataset
from prunekit.tasks.base import Metrics, Task


class RegressionMetrics(Metrics):
    """Mean absolute error and root mean squared error; the error of an image is its absolute error."""

    def update(self, prediction, target):
        self.errors.append(abs(float(prediction[0]) - float(target)))

    def compute(self):
        errors = np.array(self.errors)
        return {"mae": float(errors.mean()), "rmse": float(np.sqrt((errors**2).mean()))}


class Values(ImageDataset):
    """Images with a number each."""

    unit, targets = "images", "values"

    def empty_targets(self, count, size):
        return torch.zeros(count)

    def encode_target(self, target, size):
        return torch.tensor(target, dtype=torch.float32)

    def display_target(self, target):
        return f"{target:.3f}"


@register_task("regression")
class Regression(Task):
    """Regression: one output per image, smooth L1 loss; mean absolute and root mean squared error."""

    metric_names = ("mae", "rmse")
    lower_is_better = frozenset(metric_names)
    dataset_type = Values

    def check_output(self, output, size, images):
        shape = tuple(getattr(output, "shape", ()))
        return None if shape == (1, 1) else f"the model must return a value of shape (1, 1) for one image, not {shape}"

    def loss(self, logits, targets):
        return F.smooth_l1_loss(logits.float()[:, 0], targets, beta=0.05)

    def distillation_loss(self, logits, teacher_logits, temperature):
        return F.mse_loss(logits.float(), teacher_logits.float())

    def make_metrics(self, classes=(), quick=False):
        return RegressionMetrics()

    def render(self, prediction, classes):
        return {"value": round(float(prediction[0]), 6)}


class Discs(Values):
    """A disc on a noisy background; the value is its radius, relative to the side of the image."""

    def __init__(self, names, size, seed):
        super().__init__(names)
        self.size, self.seed = size, seed

    def target(self, index):
        return self.pair(index)[1]

    def image(self, index):
        return self.pair(index)[0]

    def pair(self, index):
        random = np.random.default_rng([self.seed, *self.names[index].encode()])
        rows, columns = np.mgrid[: self.size, : self.size] / self.size
        radius, (y, x) = random.uniform(0.1, 0.4), random.uniform(0.4, 0.6, 2)
        inside = np.hypot(rows - y, columns - x) < radius
        image = np.where(inside[..., None], 200, 40) + random.integers(0, 56, (self.size, self.size, 3))
        return image.astype(np.uint8), radius


@register_dataset("discs")
def discs(split: str, size: int, seed: int, train: int = 256, val: int = 32) -> Discs:
    """Generated discs: train and val are the numbers of images."""
    return Discs([f"{split}-{number}" for number in range({"train": train, "val": val}[split])], size, seed)


def network(width: int = 16) -> nn.Module:
    """Three strided convolutions, global average pooling and a linear layer."""
    layers, channels = [], 3
    for _ in range(3):
        layers.append(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))
