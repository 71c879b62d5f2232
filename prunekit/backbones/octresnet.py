"""ResNet for small images with gOctConvs (Gao et al., ECCV 2020, section 3.1) as convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunekit.backbones.resnet import resnet
from prunekit.config.registry import register_backbone
from prunekit.layers.octavize import octavize


@register_backbone("octresnet")
def octresnet(depth: int = 20, width: int = 16, classes: int = 10, split: Sequence[float] = (0.5, 0.5)) -> nn.Module:
    """ResNet for small images with several resolutions: split is the share of channels of each, finest first."""
    return octavize(resnet(depth, width, classes), torch.zeros(2, 3, 8, 8), split)
