"""The building blocks of CSNet (Gao et al., ECCV 2020, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.layers.goctconv import Feature, GOctConv
from prunekit.layers.optional import DepthwiseModules, MultiScaleLayer, OptionalModules

# The published model multiplies the weights of its depthwise and dilated convolutions by this factor in the forward
# pass, which enlarges their steps under Adam. Here the stored weight includes it; `step_scales` informs the optimizer.
STEP_SCALE = 100.0


class NormAct(nn.Module):
    """BatchNorm and per-channel PReLU for each branch that is present."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.norms = OptionalModules({str(b): nn.BatchNorm2d(n) for b, n in enumerate(channels) if n})
        self.acts = OptionalModules({str(b): nn.PReLU(n) for b, n in enumerate(channels) if n})

    def forward(self, xs: Sequence[Tensor | None]) -> Feature:
        return [None if x is None else self.acts[str(b)](self.norms[str(b)](x)) for b, x in enumerate(xs)]


class FuseLayer(MultiScaleLayer):
    """A gOctConv with norm and PReLU."""

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], kernel_size: int = 1, *, stride: int = 1
    ):
        super().__init__()
        self.mix = GOctConv(in_channels, out_channels, kernel_size, stride=stride)
        self.mix_out = NormAct(out_channels)

    def forward(self, xs: Sequence[Tensor | None], size: tuple[int, int] | None = None) -> Feature:
        return self.mix_out(self.mix(xs, size))


class InLayerBlock(FuseLayer):
    """In-layer multi-scale block: a gOctConv, then two depthwise 3×3 convolutions per branch, each with norm and PReLU.

    All three share one split. Branches do not exchange features after the gOctConv; there is no residual connection.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], kernel_size: int = 1, *, stride: int = 1
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.depthwise1 = _depthwise(out_channels)
        self.depthwise1_out = NormAct(out_channels)
        self.depthwise2 = _depthwise(out_channels)
        self.depthwise2_out = NormAct(out_channels)

    def forward(self, xs: Sequence[Tensor | None], size: tuple[int, int] | None = None) -> Feature:
        ys = super().forward(xs, size)
        ys = self.depthwise1_out(_each(self.depthwise1, ys))
        return self.depthwise2_out(_each(self.depthwise2, ys))


class DilatedConvs(MultiScaleLayer):
    """Parallel dilated 3×3 convolutions in each branch, concatenated and followed by one norm and PReLU.

    With k dilations, a branch of n channels has ⌊n/k⌋ outputs per dilation; the last one also takes the remainder.
    """

    def __init__(self, channels: Sequence[int], dilations: Sequence[int]):
        super().__init__()
        self.branches = OptionalModules()
        for b, n in enumerate(channels):
            if not n:
                continue
            share = n // len(dilations)
            widths = [share] * (len(dilations) - 1) + [n - share * (len(dilations) - 1)]
            self.branches[str(b)] = OptionalModules(
                {
                    str(d): _scaled(nn.Conv2d(n, width, 3, padding=d, dilation=d, bias=False))
                    for d, width in zip(dilations, widths, strict=True)
                    if width
                }
            )
        self.out = NormAct(channels)

    def forward(self, xs: Sequence[Tensor | None]) -> Feature:
        convs = [self.branches.take(b) for b in range(len(xs))]
        ys = [torch.cat([c(x) for c in cs.values()], 1) if cs else None for cs, x in zip(convs, xs, strict=True)]
        return self.out(ys)


class FusionHead(nn.Module):
    """Cross-stage fusion: the stage outputs, as branches of one feature, pass a gOctConv, dilated convolutions, and a
    gOctConv into one branch, (N, Σ⌊side/reduction⌋, H, W), at the size of the finest. ``side_channels`` are those of
    each stage's output, finest first.
    """

    def __init__(self, side_channels: Sequence[int], reduction: int = 3, dilations: Sequence[int] = (1, 2, 4, 8, 16)):
        super().__init__()
        widths = [n // reduction for n in side_channels]
        self.out_channels = sum(widths)
        self.fuse = FuseLayer(side_channels, widths)
        self.dilated = DilatedConvs(widths, dilations)
        self.merge = FuseLayer(widths, [self.out_channels])

    def forward(self, xs: Sequence[Tensor | None], size: tuple[int, int] | None = None) -> Tensor:
        return self.merge(self.dilated(self.fuse(xs, size)), size)[0]


def _depthwise(channels: Sequence[int]) -> DepthwiseModules:
    return DepthwiseModules(
        {str(b): _scaled(nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False)) for b, n in enumerate(channels) if n}
    )


def _scaled(conv: nn.Conv2d) -> nn.Conv2d:
    with torch.no_grad():
        conv.weight.mul_(STEP_SCALE)
    return conv


def _each(convs: OptionalModules, xs: Sequence[Tensor | None]) -> Feature:
    return [None if x is None else convs[str(b)](x) for b, x in enumerate(xs)]
