"""gOctConv, the generalized octave convolution (Gao et al., "Highly Efficient Salient Object Detection with 100K
Parameters", ECCV 2020, section 3.1), with one ordinary ``Conv2d`` per path between two resolutions.

A multi-scale feature is a list of tensors, one per *branch*; branch ``b`` has 1/2^b of the height and width of branch
0. A branch with zero channels is None in the list and has no modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.layers.optional import OptionalModules

Feature = list[Tensor | None]


class GOctConv(nn.Module):
    """Convolution between all resolutions of a multi-scale feature.

    Path i→j convolves input branch i into output branch j at the coarser of the two resolutions; each output branch is
    the sum of its paths. No bias, "same" zero padding. Odd sides are rounded up, so any input size works.

    Args:
        in_channels, out_channels: channels of each branch; 0 for an absent one.
        kernel_size: odd.
        stride: 1, or 2 to halve the resolution of every branch.
        downsample: how a path reaches a coarser resolution. "pool": max pooling between branches and average pooling
            for ``stride`` (as in CSNet); "stride": a strided convolution for both; "mixed": max pooling between
            branches and a strided convolution for ``stride``, so that path i→i equals the ordinary convolution.

    Shape:
        lists of (N, in_channels[i], ⌈H/2^i⌉, ⌈W/2^i⌉) to (N, out_channels[j], ⌈H/(stride·2^j)⌉, ⌈W/(stride·2^j)⌉).

    Raises:
        ValueError: no input or no output channel at all, an even kernel, an unknown ``downsample`` or a stride below 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        kernel_size: int = 1,
        *,
        stride: int = 1,
        downsample: str = "pool",
    ):
        super().__init__()
        if min(*in_channels, *out_channels, 0) < 0 or not sum(in_channels) or not sum(out_channels):
            raise ValueError(
                f"a gOctConv needs at least one channel in and one out, and none below 0; "
                f"got {list(in_channels)} → {list(out_channels)}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(
                f"a gOctConv needs an odd kernel for 'same' padding, got {kernel_size}; try {kernel_size + 1}"
            )
        if downsample not in ("pool", "stride", "mixed"):
            raise ValueError(f"downsample must be 'pool', 'stride' or 'mixed', got {downsample!r}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.branches = len(out_channels)
        self.kernel_size, self.stride, self.downsample = kernel_size, stride, downsample
        self.paths = OptionalModules()
        # The paths are slices of one weight, so the fan-in counts all input branches.
        bound = 1 / math.sqrt(sum(in_channels) * kernel_size**2)
        for i, n_in in enumerate(in_channels):
            for j, n_out in enumerate(out_channels):
                if n_in and n_out:
                    conv = nn.Conv2d(n_in, n_out, kernel_size, self.path_stride(i, j), kernel_size // 2, bias=False)
                    nn.init.uniform_(conv.weight, -bound, bound)
                    self.paths[f"{i}to{j}"] = conv

    def path_stride(self, i: int, j: int) -> int:
        if self.downsample == "pool":
            return 1
        return self.stride * 2 ** max(j - i, 0) if self.downsample == "stride" else self.stride

    def extra_repr(self) -> str:
        return f"branches={self.branches}, stride={self.stride}, downsample={self.downsample!r}"

    def forward(self, xs: Sequence[Tensor | None], size: tuple[int, int] | None = None) -> Feature:
        """Convolve; ``size`` of input branch 0 is needed only if that branch is absent and its sides are odd."""
        if size is None:
            branch, x = next((b, x) for b, x in enumerate(xs) if x is not None)
            size = x.shape[-2] * 2**branch, x.shape[-1] * 2**branch
        if self.downsample == "pool" and self.stride > 1:
            xs = [x if x is None else F.avg_pool2d(x, self.stride, ceil_mode=True) for x in xs]
        ys: Feature = [None] * self.branches
        for key, conv in self.paths.items():
            i, j = map(int, key.split("to"))
            x = xs[i]
            if i < j and self.downsample != "stride":
                x = F.max_pool2d(x, 2 ** (j - i), ceil_mode=True)
            y = conv(x)
            if i > j:
                y = F.interpolate(y, size=branch_size(size, j, self.stride), mode="bilinear", align_corners=False)
            total = ys[j]
            ys[j] = y if total is None else total + y
        return ys


def branch_size(size: tuple[int, int], branch: int, stride: int = 1) -> tuple[int, int]:
    """Return the height and width of ``branch``, given ``size`` of branch 0 before ``stride``."""
    step = stride * 2**branch
    return (size[0] + step - 1) // step, (size[1] + step - 1) // step


def split_channels(channels: int, split: Sequence[float]) -> list[int]:
    """Divide ``channels`` by shares that add up to 1; the remainder goes to the last branch with a nonzero share."""
    if not split or min(split) < 0 or not math.isclose(sum(split), 1.0, abs_tol=1e-6):
        raise ValueError(f"split must be non-negative shares that add up to 1, got {list(split)}; try [0.5, 0.5]")
    parts = [int(channels * share + 1e-9) for share in split]
    last = max(b for b, share in enumerate(split) if share > 0)
    parts[last] += channels - sum(parts)
    return parts
