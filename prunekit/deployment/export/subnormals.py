"""Subnormal numbers: what weight decay leaves behind, and what more than doubles the time of a CPU.

Setting every |v| below float32's smallest normal number to zero moves no output beyond rounding.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def subnormal_count(values: np.ndarray) -> int:
    """How many of these float32 numbers are subnormal; 0 for an array of another type."""
    if values.dtype != np.float32:
        return 0
    return int(((values != 0) & (np.abs(values) < SMALLEST_NORMAL)).sum())


def flush_tensor(values: np.ndarray) -> np.ndarray:
    """The same with zeros in the place of subnormal numbers; the array itself where it has none."""
    if not subnormal_count(values):
        return values
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.float32(0), values)


def without_subnormals(model: nn.Module) -> nn.Module:
    """A copy of the model in which no parameter or buffer is subnormal."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float32:
                tensor.masked_fill_(tensor.abs() < SMALLEST_NORMAL, 0.0)
    return model
