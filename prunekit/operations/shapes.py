"""Results of common operations on the meta device, which PyTorch computes slowly, operation by operation in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_UNARY = (
    *("relu", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu", "hardtanh", "clamp"),
    *("mish", "softplus", "relu6", "abs", "neg", "exp", "rsqrt", "sqrt", "square"),
)
_BINARY = ("add", "sub", "mul", "div")


def fast_result(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return a meta tensor like what an operation returns; None where PyTorch decides, such as about errors."""
    value = args[0] if args else None
    if name == "cat":
        return concatenated(value, kwargs.get("dim", 0) if len(args) < 2 else args[1])
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if not all(own.is_meta for own in args if isinstance(own, Tensor)):
        return None
    known = _KNOWN.get(name)
    return known(value, args, kwargs) if known is not None else None


def _like(value: Tensor) -> Tensor:
    """``torch.empty_like``, which PyTorch computes in Python on the meta device."""
    return value.new_empty(value.shape) if value.is_contiguous() else torch.empty_like(value)


def _same(value: Tensor, args: Any, kwargs: Any) -> Tensor:
    return _like(value)


def _in_place(value: Tensor, args: Any, kwargs: Any) -> Tensor:
    return value


def _norm(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    # Its own parameters are of the right length, or PyTorch names the error.
    weight = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
    return _like(value) if weight is None or weight.numel() in (1, value.shape[1]) else None


def _layer_norm(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    sides = tuple(args[1])
    matches = value.shape[-len(sides) :] == sides and all(t is None or t.shape == sides for t in args[2:4])
    return _like(value) if matches else None


def _group_norm(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    length = value.shape[1]
    matches = length % args[1] == 0 and all(t is None or len(t) == length for t in args[2:4])
    return _like(value) if matches else None


def _binary(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    other = args[1]
    if not isinstance(other, Tensor):
        return _like(value) if isinstance(other, int | float) and not kwargs else None
    if not other.is_meta or other.dtype != value.dtype:
        return None
    if other.shape == value.shape and other.stride() == value.stride():
        return _like(value)
    small, large = sorted((value, other), key=lambda tensor: (tensor.dim(), tensor.numel()))
    if not small.is_contiguous() or not large.is_contiguous():
        return None
    pairs = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return _like(large) if all(side in (1, whole) for side, whole in pairs) else None


def concatenated(parts: Any, axis: Any) -> Tensor | None:
    """The concatenation of contiguous tensors; None where PyTorch decides."""
    if not isinstance(parts, tuple | list) or not parts or not isinstance(axis, int):
        return None
    first, same = parts[0], True
    axis = axis % max(first.dim(), 1)
    for part in parts:
        same &= part.is_meta and part.dtype == first.dtype and part.dim() == first.dim() > 0 and part.is_contiguous()
        same &= part.shape[:axis] == first.shape[:axis] and part.shape[axis + 1 :] == first.shape[axis + 1 :]
    total = sum(part.shape[axis] for part in parts) if same else 0
    return first.new_empty((*first.shape[:axis], total, *first.shape[axis + 1 :])) if same else None


def _adaptive_pool(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    sides = args[1] if len(args) > 1 else None
    plain = isinstance(sides, tuple | list) and len(sides) == value.dim() - 2 and all(s and s > 0 for s in sides)
    return value.new_empty((*value.shape[:2], *sides)) if plain and value.numel() and value.is_contiguous() else None


def _mean(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    over = args[1] if len(args) > 1 else None
    if not isinstance(over, tuple | list) or not over or kwargs or not value.numel():
        return None
    axes = {axis % value.dim() for axis in over}
    if len(axes) < len(over) or not all(-value.dim() <= axis < value.dim() for axis in over):
        return None
    keeps = len(args) > 2 and args[2]
    sides = [1 if a in axes else side for a, side in enumerate(value.shape) if keeps or a not in axes]
    return value.new_empty(sides)


def _binary_in_place(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    other = args[1]
    return value if not isinstance(other, Tensor) or other.shape == value.shape else None


def _linear(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    weight = args[1] if len(args) > 1 else None
    if weight is None or weight.dim() != 2 or value.shape[-1] != weight.shape[1]:
        return None
    return value.new_empty((*value.shape[:-1], len(weight)))


def convolved(sides: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Sides of a convolution's output; none where PyTorch decides, such as whether the input is an error."""
    if not all(isinstance(option, tuple | list) for option in (stride, padding, dilation)):
        return []
    rows = zip(sides, kernel, *(_per_axis(option, len(kernel)) for option in (stride, padding, dilation)), strict=True)
    after = [(side + 2 * pad - far * (size - 1) - 1) // step + 1 for side, size, step, pad, far in rows]
    return after if min(after) > 0 else []


def _per_axis(option: Any, count: int) -> Any:
    return option if len(option) == count else [*option] * count


def _convolution(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    if kwargs or len(args) < 2:
        return None
    defaults: tuple[Any, ...] = (None, (1,), (0,), (1,), 1)
    weight, (_, stride, padding, dilation, groups) = args[1], (*args[2:], *defaults[len(args) - 2 :])
    if value.dim() != weight.dim() or value.shape[1] != weight.shape[1] * groups or len(weight) % groups:
        return None
    sides = convolved(value.shape[2:], weight.shape[2:], stride, padding, dilation)
    return value.new_empty((len(value), len(weight), *sides)) if sides else None


def _upsample(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    size, scales = args[1], args[-1]
    if size is None and isinstance(scales, tuple | list):
        size = [math.floor(side * scale) for side, scale in zip(value.shape[2:], scales, strict=True)]
    if not isinstance(size, tuple | list) or len(size) != value.dim() - 2 or min(size) < 1:
        return None
    return value.new_empty((*value.shape[:2], *size))


def _attention(value: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    if len(args) < 3:
        return None
    _, key, last = args[:3]
    same = value.shape[:-2] == key.shape[:-2] == last.shape[:-2] and value.shape[-1] == key.shape[-1]
    if not same or key.shape[-2] != last.shape[-2] or any(isinstance(own, Tensor) for own in kwargs.values()):
        return None
    return value.new_empty((*value.shape[:-1], last.shape[-1])) if len(args) < 4 or args[3] is None else None


_KNOWN: dict[str, Callable[[Tensor, Any, Any], Tensor | None]] = {
    **dict.fromkeys(_UNARY, _same),
    **dict.fromkeys([f"{name}_" for name in _UNARY], _in_place),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys([f"{name}_" for name in _BINARY], _binary_in_place),
    **{"batch_norm": _norm, "instance_norm": _norm, "prelu": _norm, "layer_norm": _layer_norm, "linear": _linear},
    **{"adaptive_avg_pool1d": _adaptive_pool, "adaptive_avg_pool2d": _adaptive_pool, "mean": _mean},
    **{"softmax": _same, "scaled_dot_product_attention": _attention},
    **{"group_norm": _group_norm, **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution)},
    **{f"upsample_{kind}": _upsample for kind in ("nearest2d", "bilinear2d", "bicubic2d", "nearest1d", "linear1d")},
}
