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


class FastShapes(TorchFunctionMode):
    """Replace operations whose meta shapes PyTorch computes slowly, operation by operation: norms and PReLUs by
    identities, bilinear and bicubic up-sampling by nearest-neighbor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.batch_norm, F.prelu) and args and all(t.is_meta for t in args if isinstance(t, Tensor)):
            return args[0].clone()
        if func is F.interpolate and kwargs.get("mode") in ("bilinear", "bicubic") and not kwargs.get("antialias"):
            kwargs = {**kwargs, "mode": "nearest", "align_corners": None}
        return func(*args, **kwargs)
