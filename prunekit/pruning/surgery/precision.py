"""Running a model in float64 throughout, also where its code asks for a lower precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWER = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
FEW = 128  # positions of a batch up to which one product of matrices is faster than PyTorch's convolution


@contextmanager
def in_float64() -> Iterator[None]:
    """Make float64 the default, and replace each lower precision that code names, such as by ``x.float()``.

    Rounding to a lower precision would be larger than the difference that the equivalence check looks for.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            func = Tensor.double
        elif func is F.conv2d:
            func = conv2d
        elif any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            args = [_raised(value) for value in args]
            kwargs = {key: _raised(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d``, of small maps as one product of matrices for the whole batch, and of single channels as a sum.

    In float64 PyTorch reads the weights again for each image, and convolves the groups one by one.
    """
    plain = all(isinstance(option, tuple) for option in (stride, padding, dilation))
    if not plain or x.dim() != 4 or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if len(weight) == x.shape[1] == groups > 1:
        return _depthwise(x, weight, bias, stride, padding, dilation)
    if len(x) * x.shape[2] * x.shape[3] > FEW * stride[0] * stride[1]:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    patches = F.pad(x, [padding[1]] * 2 + [padding[0]] * 2)
    for axis, size in enumerate(weight.shape[2:]):
        reach = dilation[axis] * (size - 1) + 1
        patches = patches.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    images, _, height, width = patches.shape[:4]
    rows = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2, 5, 6).reshape(groups, images * height * width, -1)
    result = rows @ weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)
    result = result.view(groups, images, height, width, -1).permute(1, 0, 4, 2, 3).reshape(images, -1, height, width)
    return (result if bias is None else result + bias.view(-1, 1, 1)).contiguous()


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The sum over the positions of the kernel, with the channels last: several times faster than group by group."""
    padded = F.pad(x.permute(0, 2, 3, 1), [0, 0, padding[1], padding[1], padding[0], padding[0]]).contiguous()
    for axis, size in enumerate(weight.shape[2:]):
        padded = padded.unfold(1 + axis, dilation[axis] * (size - 1) + 1, stride[axis])
    images, height, width, channels = padded.shape[:4]
    result = padded.new_zeros(images, height, width, channels)
    for row, column in product(*map(range, weight.shape[2:])):
        result.addcmul_(padded[..., row * dilation[0], column * dilation[1]], weight[:, 0, row, column])
    if bias is not None:
        result += bias
    return result.permute(0, 3, 1, 2).contiguous()
