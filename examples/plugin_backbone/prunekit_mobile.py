"""A small saliency network of inverted residuals (Sandler et al., "MobileNetV2", CVPR 2018), for prunekit.

prunekit needs only the function at the end, which builds the dense model. The model does not depend on prunekit.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import register_backbone


class InvertedResidual(nn.Module):
    """1×1 up, 3×3 depthwise, 1×1 down; a shortcut where the shape does not change.

    Shape:
        input: (N, inputs, H, W); output: (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.up = nn.Conv2d(inputs, wide, 1, bias=False)
        self.up_norm = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(wide)
        self.down = nn.Conv2d(wide, outputs, 1, bias=False)
        self.down_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.up_norm(self.up(x)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.down_norm(self.down(y))
        return x + y if self.shortcut else y


class MobileSaliency(nn.Module):
    """A stem at half resolution, inverted residuals down to an eighth, and a logit map of the input's size.

    Shape:
        input: (N, 3, H, W); output: (N, 1, H, W).
    """

    def __init__(self, width: int, expansion: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            InvertedResidual(width, width, 1, expansion),
            InvertedResidual(width, 2 * width, 2, expansion),
            InvertedResidual(2 * width, 2 * width, 1, expansion),
            InvertedResidual(2 * width, 4 * width, 2, expansion),
            InvertedResidual(4 * width, 4 * width, 1, expansion),
        )
        self.head = nn.Conv2d(4 * width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu6(self.stem_norm(self.stem(image)))
        return F.interpolate(self.head(self.blocks(x)), size=image.shape[-2:], mode="bilinear", align_corners=False)


@register_backbone("mobile_saliency")
def mobile_saliency(width: int = 16, expansion: int = 4) -> nn.Module:
    """Inverted residuals for saliency; width is the number of channels of the stem."""
    if width < 1 or expansion < 1:
        raise ValueError(f"width and expansion must be at least 1, got {width} and {expansion}")
    return MobileSaliency(width, expansion)
