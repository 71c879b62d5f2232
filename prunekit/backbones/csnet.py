"""CSNet, a salient object detector (Gao et al., "Highly Efficient Salient Object Detection with 100K Parameters", ECCV
2020; Cheng et al., TPAMI 2021), implemented from the papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.registry import register_backbone
from prunekit.layers import FusionHead, InLayerBlock, branch_size, split_channels
from prunekit.layers.blocks import STEP_SCALE

# Of stages 1 to 4; stage 0 is one 3×3 block of the width.
BLOCKS = (3, 4, 6, 4)
MULTIPLES = (1, 2, 4, 4)  # channels ÷ width


class CSNet(nn.Module):
    """The extractor of five stages and the fusion head: (N, 3, H, W), any H and W, to logits (N, 1, H, W)."""

    def __init__(self, width: int, split: Sequence[float], blocks: Sequence[int]):
        super().__init__()
        channels = split_channels(width, split)
        self.stage0 = nn.ModuleList([InLayerBlock([3], channels, 3)])
        sides = []
        for index, (count, multiple) in enumerate(zip(blocks, MULTIPLES, strict=True), start=1):
            stage = nn.ModuleList()
            for block in range(count):
                first = index > 1 and block == 0
                # Stages 2 to 4 end in one branch, the input of the next stage and of the head.
                last = index > 1 and block == count - 1
                out = [width * multiple] if last else split_channels(width * multiple, split)
                stage.append(InLayerBlock(channels, out, 3 if first else 1, stride=2 if first else 1))
                channels = out
            self.add_module(f"stage{index}", stage)
            if index > 1:
                sides.append(width * multiple)
        self.head = FusionHead(sides)
        self.classifier = nn.Conv2d(self.head.out_channels, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[-2], image.shape[-1]
        xs, sides, branch0 = [image], [], size
        for index in range(len(MULTIPLES) + 1):
            for block in getattr(self, f"stage{index}"):
                xs = block(xs, branch0)
                branch0 = branch_size(branch0, 0, block.mix.stride)
            if index == 2:
                finest = branch0
            if index > 1:
                sides.append(xs[0])
        logits = self.classifier(self.head(sides, finest))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def step_scales(self) -> dict[str, float]:
        """Return the scale of each scaled parameter, see :mod:`prunekit.training.optimizers`."""
        return {
            f"{name}.weight": STEP_SCALE
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d) and (".depthwise" in name or ".dilated." in name)
        }


@register_backbone("csnet")
def csnet(width: int = 20, split: Sequence[float] = (0.5, 0.5), blocks: Sequence[int] = BLOCKS) -> nn.Module:
    """CSNet for saliency: width 20 is the published ×1, 40 the ×2; split is the share of channels per resolution;
    blocks are those of stages 1 to 4."""
    if width < 8:
        raise ValueError(f"width={width} must be at least 8 (published: 20 and 40)")
    if len(blocks) != len(BLOCKS) or any(type(count) is not int or count < 1 for count in blocks):
        raise ValueError(f"blocks={list(blocks)} must be four whole numbers above 0 (published: {list(BLOCKS)})")
    return CSNet(width, split, blocks)
