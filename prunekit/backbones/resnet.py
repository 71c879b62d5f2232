"""ResNet for small images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2).

Shortcuts between stages are of option B: zero-padded ones (A) have no gates, so the stage could not be pruned.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.registry import register_backbone


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with norms and a shortcut: (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages, global pooling and a linear layer: (N, 3, H, W), any H and W, to logits (N, classes)."""

    def __init__(self, depth: int, width: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        inputs, blocks = width, (depth - 2) // 6
        for stage in range(3):
            outputs = width << stage
            first = BasicBlock(inputs, outputs, stride=2 if stage else 1)
            rest = (BasicBlock(outputs, outputs) for _ in range(blocks - 1))
            self.add_module(f"stage{stage + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(image)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_backbone("resnet")
def resnet(depth: int = 20, width: int = 16, classes: int = 10) -> nn.Module:
    """ResNet for small images: depth is 6n + 2 (20 to 110 in the paper), width is that of the first stage."""
    if depth < 8 or depth % 6 != 2:
        below = max(8, (depth - 2) // 6 * 6 + 2)
        raise ValueError(f"depth={depth} must be 6n + 2; set it to {below} or {below + 6}")
    if width < 1 or classes < 1:
        raise ValueError(f"width={width} and classes={classes} must be at least 1")
    return ResNet(depth, width, classes)
