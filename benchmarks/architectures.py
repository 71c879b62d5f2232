"""ResNet, DenseNet, MobileNet and EfficientNet as in torchvision, with 1000 classes, without depending on it.

He et al., "Deep Residual Learning for Image Recognition", 2015 (stride on the 3×3 of a bottleneck, as torchvision has
it); Huang et al., "Densely Connected Convolutional Networks", 2017. Their module names and order are those of
torchvision, so that its weights can be loaded. Sandler et al., "MobileNetV2", 2018; Howard et al., "Searching for
MobileNetV3", 2019; Tan and Le, "EfficientNet", 2019. Input (N, 3, H, W), output (N, classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inp: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inp: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], width: int = 64, classes: int = 1000
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inp = width
        for stage, count in enumerate(blocks):
            wide, layers = width * 2**stage, []
            for index in range(count):
                stride = 2 if stage and not index else 1
                downsample = None
                if stride != 1 or inp != wide * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(inp, wide * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(wide * block.expansion),
                    )
                layers.append(block(inp, wide, stride, downsample))
                inp = wide * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inp, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    def __init__(self, inp: int, growth: int, squeeze: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inp)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inp, squeeze * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(squeeze * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(squeeze * growth, growth, 3, 1, 1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inp: int, growth: int, squeeze: int):
        super().__init__()
        for index in range(layers):
            self[f"denselayer{index + 1}"] = DenseLayer(inp + index * growth, growth, squeeze)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, blocks: Sequence[int], growth: int = 32, stem: int = 64, squeeze: int = 4, classes: int = 1000):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, stem, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(stem))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        width = stem
        for index, layers in enumerate(blocks, 1):
            self.features.add_module(f"denseblock{index}", DenseBlock(layers, width, growth, squeeze))
            width += layers * growth
            if index < len(blocks):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(width))
                transition.add_module("relu", nn.ReLU(inplace=True))
                transition.add_module("conv", nn.Conv2d(width, width // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                self.features.add_module(f"transition{index}", transition)
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeeze: int, act: type[nn.Module], gate: type[nn.Module]):
        super().__init__()
        self.fc1, self.act = nn.Conv2d(width, squeeze, 1), act()
        self.fc2, self.gate = nn.Conv2d(squeeze, width, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


def conv_norm(inp: int, out: int, kernel: int, stride: int, act: type[nn.Module], groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act())


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, out: int, kernel: int, stride: int, hidden: int, act: type, squeeze: nn.Module | None):
        super().__init__()
        layers = [conv_norm(inp, hidden, 1, 1, act)] if hidden != inp else []
        layers += [conv_norm(hidden, hidden, kernel, stride, act, hidden), *([squeeze] if squeeze else [])]
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNet(nn.Sequential):
    """``blocks``: (output channels, kernel, stride, hidden channels, activation, squeeze-excite or None) each."""

    def __init__(self, stem: int, blocks: Sequence[tuple], last: int, act: type[nn.Module], hidden: int, classes: int):
        inp, layers = stem, []
        for out, kernel, stride, wide, block_act, squeeze in blocks:
            layers.append(InvertedResidual(inp, out, kernel, stride, wide, block_act, squeeze))
            inp = out
        head = [nn.Linear(last, hidden), act()] if hidden else []
        super().__init__(
            *(conv_norm(3, stem, 3, 2, act), *layers, conv_norm(inp, last, 1, 1, act)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head, nn.Linear(hidden or last, classes)),
        )


def round_to_8(width: float) -> int:
    """Return the nearest multiple of 8 that is not below 90% of the width, as those papers' code does."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 * (rounded < 0.9 * width)


def mobilenet_v2(width: float = 1.0, classes: int = 1000) -> MobileNet:
    # Expansion, output channels, number of blocks, stride.
    rows = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    stem = inp = round_to_8(32 * width)
    blocks = []
    for expand, out, count, first in rows:
        for index in range(count):
            blocks.append((round_to_8(out * width), 3, 1 if index else first, inp * expand, nn.ReLU6, None))
            inp = round_to_8(out * width)
    return MobileNet(stem, blocks, max(1280, round_to_8(1280 * width)) if width >= 1 else 128, nn.ReLU6, 0, classes)


def mobilenet_v3(width: float = 1.0, classes: int = 1000) -> MobileNet:
    """Return the large one."""
    # Kernel, hidden and output channels, squeeze-excite, hard-swish, stride.
    rows = (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1)
    rows += (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1)
    rows += (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2)
    rows += (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1)
    blocks = []
    for kernel, hidden, out, squeeze, hard, stride in rows:
        hidden, act = round_to_8(hidden * width), nn.Hardswish if hard else nn.ReLU
        excite = SqueezeExcite(hidden, round_to_8(hidden / 4), nn.ReLU, nn.Hardsigmoid) if squeeze else None
        blocks.append((round_to_8(out * width), kernel, stride, hidden, act, excite))
    last, head = round_to_8(960 * width), round_to_8(1280 * width)
    return MobileNet(round_to_8(16 * width), blocks, last, nn.Hardswish, head, classes)


def efficientnet(width: float = 1.0, depth: float = 1.0, classes: int = 1000) -> MobileNet:
    """Return B0; B2 has width 1.1 and depth 1.2."""
    # Expansion, kernel, stride, output channels, number of blocks.
    rows = (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4)
    stem = inp = round_to_8(32 * width)
    blocks = []
    for expand, kernel, first, out, count in (*rows, (6, 3, 1, 320, 1)):
        for index in range(math.ceil(count * depth)):
            squeeze = SqueezeExcite(inp * expand, max(1, inp // 4), nn.SiLU, nn.Sigmoid)
            stride = 1 if index else first
            blocks.append((round_to_8(out * width), kernel, stride, inp * expand, nn.SiLU, squeeze))
            inp = round_to_8(out * width)
    return MobileNet(stem, blocks, 4 * inp, nn.SiLU, 0, classes)


NETWORKS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "densenet121": partial(DenseNet, (6, 12, 24, 16)),
    "densenet201": partial(DenseNet, (6, 12, 48, 32)),
}
MOBILE = {
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet_b0": efficientnet,
    "efficientnet_b2": partial(efficientnet, 1.1, 1.2),
}
# For trying out a script.
TINY = {
    "tiny-resnet": partial(ResNet, BasicBlock, (1, 1), width=8, classes=10),
    "tiny-densenet": partial(DenseNet, (2, 3), growth=4, stem=8, squeeze=2, classes=10),
}


def deep_resnet(blocks: int) -> ResNet:
    """Return a narrow ResNet of four stages with ``blocks`` basic blocks each: 8·blocks + 2 layers."""
    return ResNet(BasicBlock, (blocks,) * 4, width=16, classes=10)


def deep_densenet(layers: int) -> DenseNet:
    """Return a DenseNet of four blocks with ``layers`` layers each, growth 8: 8·layers + 5 layers.

    Every layer reads all previous ones of its block, so the size grows with the square of the depth.
    """
    return DenseNet((layers,) * 4, growth=8, stem=16, classes=10)
