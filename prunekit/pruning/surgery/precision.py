"""Running a model in float64 throughout, also where its code asks for a lower precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWER = {torch.float32, torch.float16, torch.bfloat16}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


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
        elif any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            args = [_raised(value) for value in args]
            kwargs = {key: _raised(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value
