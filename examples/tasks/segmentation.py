"""Multi-class semantic segmentation as a prunekit task, with a generated data set and a small network.

prunekit run examples/tasks/segmentation.yaml
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prunekit import register_dataset, register_task
from prunekit.data.datasets import ImageDataset, resize
from prunekit.tasks.base import Metrics, Task

LABELS = 256  # of a uint8 class map


class SegmentationMetrics(Metrics):
    """Mean IoU over the classes that occur, and pixel accuracy."""

    def __init__(self):
        super().__init__()
        self.confusion = np.zeros((LABELS, LABELS), np.int64)

    def update(self, prediction, target):
        pairs = LABELS * target.astype(np.int64) + prediction
        self.confusion += np.bincount(pairs.ravel(), minlength=LABELS**2).reshape(LABELS, LABELS)
        self.errors.append(float((prediction != target).mean()))

    def compute(self):
        hits = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        iou = hits[union > 0] / union[union > 0]
        return {"miou": float(iou.mean()), "pixel_accuracy": float(hits.sum() / self.confusion.sum())}


class ClassMaps(ImageDataset):
    """Images with a class map each: uint8 [H, W] of labels."""

    unit, targets = "images", "class maps"

    def empty_targets(self, count, size):
        return torch.zeros(count, size, size, dtype=torch.int64)

    def encode_target(self, target, size):
        return F.interpolate(torch.from_numpy(target)[None, None].float(), (size, size), mode="nearest")[0, 0].long()

    def display_target(self, target):
        return target * np.uint8(255 // (len(self.classes) - 1))


@register_task("segmentation")
class Segmentation(Task):
    """Semantic segmentation: a logit per class and pixel, cross-entropy; mean IoU and pixel accuracy."""

    metric_names = ("miou", "pixel_accuracy")
    dataset_type = ClassMaps
    predicts_images = True

    def check_output(self, output, size, images):
        expected, shape = (1, len(images.classes), size, size), tuple(getattr(output, "shape", ()))
        return None if shape == expected else f"the model must return logits of shape {expected}, not {shape}"

    def loss(self, logits, targets):
        return F.cross_entropy(logits.float(), targets)

    def make_metrics(self, classes=(), quick=False):
        return SegmentationMetrics()

    def postprocess(self, scores, size):
        return resize(scores[None], size)[0].argmax(0).to(torch.uint8).numpy()

    def decode_target(self, target):
        return target.to(torch.uint8).numpy()

    def render(self, prediction, classes):
        return prediction * np.uint8(255 // (len(classes) - 1))


class Shapes(ClassMaps):
    """A disc and a square on a noisy background."""

    classes = ("background", "disc", "square")

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
        target = np.zeros((self.size, self.size), np.uint8)
        for label, norm in ((1, np.hypot), (2, lambda y, x: np.maximum(abs(y), abs(x)))):
            y, x = random.uniform(0.2, 0.8, 2)
            target[norm(rows - y, columns - x) < random.uniform(0.1, 0.25)] = label
        colors = random.integers(0, 200, (3, 3))
        image = colors[target] + random.integers(0, 56, (self.size, self.size, 3))
        return image.astype(np.uint8), target


@register_dataset("shapes")
def shapes(split: str, size: int, seed: int, train: int = 256, val: int = 32) -> Shapes:
    """Generated discs and squares: train and val are the numbers of images."""
    return Shapes([f"{split}-{number}" for number in range({"train": train, "val": val}[split])], size, seed)


def network(classes: int = 3, width: int = 16) -> nn.Module:
    """Four convolutions at full resolution."""
    layers, channels = [], 3
    for dilation in (1, 2, 4):
        layers.append(nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(width, classes, 1))
