"""Autograd operations on the kernels, for channels-last float32 and float64 tensors on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prunekit.native.library import NoKernels, load

SUFFIXES = {torch.float32: "float", torch.float64: "double"}


def usable(x: Tensor) -> bool:
    """Whether the kernels support this tensor, (N, C, H, W)."""
    return (
        x.device.type == "cpu"
        and x.dtype in SUFFIXES
        and x.dim() == 4
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(load(), NoKernels)
    )


def norm_act(x: Tensor, norm: nn.BatchNorm2d, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply BatchNorm in train mode and a PReLU; update the norm's running statistics.

    Args:
        x: :func:`usable`, (N, C, H, W), of the norm's dtype, with more than one value per channel.
        norm: affine, with running statistics and a momentum.
        slope: of the PReLU, (C,) or (1,); None for no activation.

    Returns:
        the output, channels-last, and its means over height and width, (N, C), without gradient.
    """
    return _NormAct.apply(x, norm.weight, norm.bias, slope, norm)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve ``x``, (N, C, H, W), depthwise with ``weight``, (C, 1, 3, 3); padding 1, stride 1."""
    return _Depthwise.apply(x, weight)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, slope: Tensor | None, norm: nn.BatchNorm2d
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        y, saved, means = torch.empty_like(x), x.new_empty(5, c), x.new_empty(n, c)
        ctx.slopes = 0 if slope is None else len(slope)
        numbers = ctx.slopes == 1, norm.eps, norm.momentum
        running = norm.running_mean, norm.running_var
        _call("norm_act", x.dtype, x, gamma, beta, slope, *numbers, *running, saved, y, means, n, h * w, c)
        ctx.save_for_backward(x, saved)
        ctx.mark_non_differentiable(means)
        ctx.set_materialize_grads(False)
        return y, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, saved = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        grad_x, grads = torch.empty_like(x), x.new_empty(3, c)
        _call("norm_act_backward", x.dtype, grad, x, saved, grad_x, grads, n, h * w, c)
        grad_slope = None if not ctx.slopes else grads[2] if ctx.slopes == c else grads[2].sum().view(1)
        return grad_x, grads[0], grads[1], grad_slope, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        kernel = weight.flatten(1).t().contiguous()
        ctx.save_for_backward(x, kernel)
        return _convolve(x, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        grad_x = _convolve(grad, kernel.flip(0)) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_kernel = x.new_empty(9, c)
            _call("depthwise_kernel", x.dtype, grad, x, grad_kernel, n, h, w, c)
            grad_weight = grad_kernel.t().reshape(c, 1, 3, 3)
        return grad_x, grad_weight


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    _call("depthwise", x.dtype, x, kernel.contiguous(), y, n, h, w, c)
    return y


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    function: Callable[..., None] = getattr(load(), f"{name}_{SUFFIXES[dtype]}")
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())
