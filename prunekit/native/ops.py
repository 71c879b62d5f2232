"""Operations with gradients out of the kernels, on channels-last tensors of float32 or float64 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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


def norm_act(x: Tensor, norm: nn.BatchNorm2d, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """BatchNorm by the batch's own statistics, and the PReLU behind it; the norm's running statistics move along.

    Args:
        x: (N, C, H, W), for which :func:`usable` holds; of the norm's type, and with more than one number a channel.
        norm: affine, with running statistics and a momentum.
        slope: of the PReLU, (C,) or (1,); None for no activation.

    Returns:
        The output, channels-last, and its means over height and width (N, C), these without gradient.
    """
    return _NormAct.apply(x, norm.weight, norm.bias, slope, norm)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """The depthwise convolution of a 3×3 ``weight`` (C, 1, 3, 3) over ``x`` (N, C, H, W), padding 1, stride 1."""
    return _Depthwise.apply(x, weight)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, slope: Tensor | None, norm: nn.BatchNorm2d
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        y, held, means = torch.empty_like(x), x.new_empty(5, c), x.new_empty(n, c)
        ctx.slopes = 0 if slope is None else len(slope)
        numbers = ctx.slopes == 1, norm.eps, norm.momentum
        moved = norm.running_mean, norm.running_var
        _call("norm_act", x.dtype, x, gamma, beta, slope, *numbers, *moved, held, y, means, n, h * w, c)
        ctx.save_for_backward(x, held)
        ctx.mark_non_differentiable(means)
        ctx.set_materialize_grads(False)
        return y, means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, held = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        to_x, found = torch.empty_like(x), x.new_empty(3, c)
        _call("norm_act_backward", x.dtype, grad, x, held, to_x, found, n, h * w, c)
        to_slope = None if not ctx.slopes else found[2] if ctx.slopes == c else found[2].sum().view(1)
        return to_x, found[0], found[1], to_slope, None


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        kernel = weight.flatten(1).t().contiguous()
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
            found = x.new_empty(9, c)
            _call("depthwise_kernel", x.dtype, grad, x, found, n, h, w, c)
            to_kernel = found.t().reshape(c, 1, 3, 3)
        return to_x, to_kernel


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    _call("depthwise", x.dtype, x, kernel.contiguous(), y, n, h, w, c)
    return y


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    function: Callable[..., None] = getattr(load(), f"{name}_{KINDS[dtype]}")
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())
