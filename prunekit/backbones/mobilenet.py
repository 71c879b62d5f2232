"""MobileNet for small images: the blocks of EfficientNet (Tan & Le, ICML 2019, section 4).

These are inverted residuals (Sandler et al., "MobileNetV2", CVPR 2018) with squeeze-and-excitation and SiLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.registry import register_backbone


class SqueezeExcite(nn.Module):
    """Scales each channel by a number between 0 and 1 that depends on all of them: (N, C, H, W) to the same shape."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * scale.sigmoid()


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and a norm: (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class InvertedResidual(nn.Module):
    """Expand, depthwise 3×3, squeeze and excite, project: (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1):
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = conv(hidden, hidden, 3, stride, groups=hidden)
        self.excite = SqueezeExcite(hidden, max(1, inputs // 4))
        self.project = conv(hidden, outputs, 1)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else F.silu(self.expand(x))
        out = self.project(self.excite(F.silu(self.depthwise(out))))
        return x + out if self.has_shortcut else out


class MobileNet(nn.Module):
    """Stem, stages, head, global pooling, a linear layer: (N, 3, H, W), any H and W, to logits (N, classes)."""

    def __init__(self, widths: Sequence[int], blocks: int, expansion: int, head: int, classes: int):
        super().__init__()
        self.stem = conv(3, widths[0], 3)
        inputs, layers = widths[0], []
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(InvertedResidual(inputs, outputs, expansion if stage else 1, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.head = conv(inputs, head, 1)
        self.classifier = nn.Linear(head, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(F.silu(self.stem(image)))
        return self.classifier(F.adaptive_avg_pool2d(F.silu(self.head(x)), 1).flatten(1))


@register_backbone("mobilenet")
def mobilenet(
    widths: Sequence[int] = (16, 32, 64), blocks: int = 2, expansion: int = 4, head: int = 128, classes: int = 10
) -> nn.Module:
    """MobileNet for small images: widths and blocks are those of the stages; all but the first halve the size."""
    if not widths or min(widths) < 1:
        raise ValueError(f"widths={list(widths)} must be one or more numbers of at least 1")
    for name, value in {"blocks": blocks, "expansion": expansion, "head": head, "classes": classes}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    return MobileNet(widths, blocks, expansion, head, classes)
