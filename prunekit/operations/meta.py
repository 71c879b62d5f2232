"""Models on the meta device, where only shapes are computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.operations.shapes import concatenated, fast_result
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


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_BINARY = {torch.add, Tensor.add, Tensor.__add__, torch.mul, Tensor.mul, Tensor.__mul__}
_NORMS = {F.batch_norm, F.instance_norm, F.prelu}
# Like their first argument, whatever its sides, and on the meta device there are no values: it is returned itself.
POINTWISE = {F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.gelu, F.mish, F.softplus, F.sigmoid, F.tanh}
POINTWISE |= {F.hardswish, F.hardsigmoid, F.softmax, F.dropout, torch.relu, torch.sigmoid, torch.tanh}
POINTWISE |= {Tensor.relu, Tensor.sigmoid, Tensor.tanh, Tensor.softmax, *_NORMS}


def _broadcast(a: Any, b: Any) -> Tensor | None:
    """The one of two operands that is like their sum; None where neither is, or where PyTorch decides."""
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta and b.is_meta
    if not tensors or a.dtype != b.dtype or a.dim() != b.dim():
        return None
    if all(one in (other, 1) for one, other in zip(b.shape, a.shape, strict=True)):
        return a
    return b if all(one in (other, 1) for one, other in zip(a.shape, b.shape, strict=True)) else None


def _pooled(x: Tensor, size: Any) -> Tensor | None:
    """The result of an adaptive pooling."""
    if x.dim() != 4 or not isinstance(size, int | tuple | list):
        return None
    sides = [size] * 2 if isinstance(size, int) else [s or side for s, side in zip(size, x.shape[2:], strict=True)]
    return x.new_empty((*x.shape[:2], *sides)) if x.numel() and min(sides) > 0 else None


class FastShapes(TorchFunctionMode):
    """Replace operations whose meta shapes PyTorch computes slowly, operation by operation: norms and PReLUs by
    identities, bilinear and bicubic up-sampling by nearest-neighbor, and, without gradients, convolutions, linear
    layers, activations, sums, products, concatenations, layer norms, attentions and adaptive poolings."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS and args and all(t.is_meta for t in args if isinstance(t, Tensor)):
            return args[0].clone()
        fast = None if torch.is_grad_enabled() or not args else self._fast(func, args, kwargs)
        if fast is not None:
            return fast
        if func is F.interpolate and kwargs.get("mode") in ("bilinear", "bicubic") and not kwargs.get("antialias"):
            kwargs = {**kwargs, "mode": "nearest", "align_corners": None}
        return func(*args, **kwargs)

    def _fast(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        first = args[0]
        if func is torch.cat:
            return concatenated(first, kwargs.get("dim", 0) if len(args) < 2 else args[1])
        if func in _BINARY and len(args) == 2 and not kwargs:
            return _broadcast(*args)
        if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point():
            return None
        if func in POINTWISE and not isinstance(kwargs.get("dtype"), torch.dtype):
            return first
        if func is F.layer_norm and len(args) > 1 and tuple(args[1]) == first.shape[first.dim() - len(args[1]) :]:
            return first
        if func in (F.linear, F.scaled_dot_product_attention, *CONVOLUTIONS):
            return fast_result(func.__name__, args, kwargs)
        if func is F.adaptive_avg_pool2d and len(args) == 2:
            return _pooled(*args)
        return None
