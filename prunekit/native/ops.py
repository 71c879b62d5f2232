"""Operations with gradients out of the kernels, on channels-last tensors of float32 or float64 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prunekit.native.library import NoKernels, load

KINDS = {torch.float32: "float", torch.float64: "double"}


def usable(x: Tensor) -> bool:
    """Whether the kernels take this tensor (N, C, H, W)."""
    return (
        x.device.type == "cpu"
        and x.dtype in KINDS
        and x.dim() == 4
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(load(), NoKernels)
    )


def norm_act(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    slope: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchNorm by the batch's own statistics, and the PReLU behind it.

    Args:
        x: (N, C, H, W), for which :func:`usable` holds.
        gamma, beta: of the norm, (C,).
        slope: of the PReLU, (C,) or (1,); None for no activation.
        eps: of the norm.

    Returns:
        The output, channels-last; its means over height and width (N, C), float64; and the batch's mean and its biased
        variance (C,), float64. The last three without gradient.
    """
    return _NormAct.apply(x, gamma, beta, slope, eps)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """The depthwise convolution of a 3×3 ``weight`` (C, 1, 3, 3) over ``x`` (N, C, H, W), padding 1, stride 1."""
    return _Depthwise.apply(x, weight)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, slope: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        mean, variance = (torch.empty(c, dtype=torch.float64) for _ in range(2))
        _call("norm_stats", x.dtype, x, n, h * w, c, mean, variance, torch.get_num_threads())
        deviation = (variance + eps).rsqrt()
        scale = gamma.double() * deviation
        shift = (beta.double() - mean * scale).to(x.dtype)
        scale = scale.to(x.dtype)
        slopes = (gamma.new_ones(c) if slope is None else slope.expand(c)).to(x.dtype).contiguous()
        y, sums = torch.empty_like(x), torch.empty(n, c, dtype=torch.float64)
        _call("norm_act", x.dtype, x, scale, shift, slopes, y, sums, n, h * w, c, torch.get_num_threads())
        ctx.save_for_backward(x, scale, shift, slopes, mean, deviation)
        ctx.slopes = None if slope is None else len(slope)
        means = sums / (h * w)
        ctx.mark_non_differentiable(means, mean, variance)
        ctx.set_materialize_grads(False)
        return y, means, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, scale, shift, slopes, mean, deviation = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        to_x = torch.empty_like(x)
        to_gamma, to_beta, to_slope = (torch.empty(c, dtype=torch.float64) for _ in range(3))
        constants = scale, shift, slopes, mean, deviation
        found = to_x, to_gamma, to_beta, to_slope
        _call("norm_act_backward", x.dtype, grad, x, *constants, *found, n, h * w, c, 1, torch.get_num_threads())
        to_gamma, to_beta, to_slope = (one.to(x.dtype) for one in (to_gamma, to_beta, to_slope))
        if ctx.slopes is None:
            to_slope = None
        elif ctx.slopes == 1:
            to_slope = to_slope.sum().view(1)
        return to_x, to_gamma, to_beta, to_slope, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        kernel = weight.to(x.dtype).flatten(1).t().contiguous()
        ctx.save_for_backward(x, kernel)
        return _filtered(x, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        to_x = _filtered(grad, kernel.flip(0)) if ctx.needs_input_grad[0] else None
        to_kernel = None
        if ctx.needs_input_grad[1]:
            found = torch.empty(9, c, dtype=torch.float64)
            _call("depthwise_kernel", x.dtype, grad, x, found, n, h, w, c, torch.get_num_threads())
            to_kernel = found.to(x.dtype).t().reshape(c, 1, 3, 3)
        return to_x, to_kernel


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    _call("depthwise", x.dtype, x, kernel.contiguous(), y, n, h, w, c, torch.get_num_threads())
    return y


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int) -> None:
    function: Callable[..., None] = getattr(load(), f"{name}_{KINDS[dtype]}")
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
