"""Models on the meta device, where only shapes are computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.utils.copying import copy_module


def to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta")
                is_parameter = name in module._parameters
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy_module(model, memo)


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_SUMS = (torch.add, Tensor.add, Tensor.__add__)


def _output_sides(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> list[int]:
    """Sides of a convolution's output; none where PyTorch decides, such as whether the input is an error."""
    if not (x.is_meta and weight.is_meta and x.dim() == weight.dim() and x.shape[1] == weight.shape[1] * groups):
        return []
    if not all(isinstance(option, tuple) for option in (stride, padding, dilation)):
        return []
    rows = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sides = [(side + 2 * pad - far * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, far in rows]
    return sides if min(sides) > 0 else []


def _is_plain_sum(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta and b.is_meta
    return tensors and a.shape == b.shape and a.dtype == b.dtype


class FastShapes(TorchFunctionMode):
    """Replace operations whose meta shapes PyTorch computes slowly, operation by operation: norms and PReLUs by
    identities, bilinear and bicubic up-sampling by nearest-neighbor, and, without gradients, convolutions and sums."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in (F.batch_norm, F.instance_norm, F.prelu)
            and args
            and all(t.is_meta for t in args if isinstance(t, Tensor))
        ):
            return args[0].clone()
        if not torch.is_grad_enabled() and not kwargs:
            if func in _CONVOLUTIONS and len(args) == 7 and (sides := _output_sides(*args)):
                return args[0].new_empty((len(args[0]), len(args[1]), *sides))
            if func in _SUMS and len(args) == 2 and _is_plain_sum(*args):
                return args[0].clone()
        if func is F.interpolate and kwargs.get("mode") in ("bilinear", "bicubic") and not kwargs.get("antialias"):
            kwargs = {**kwargs, "mode": "nearest", "align_corners": None}
        return func(*args, **kwargs)
