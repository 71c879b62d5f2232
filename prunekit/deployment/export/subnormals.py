"""Subnormal numbers, which weight decay leaves in the weights and CPUs compute with slowly."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from prunekit.utils.copying import copy_module

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def subnormal_count(values: np.ndarray) -> int:
    """The number of subnormal float32 numbers; 0 for other dtypes."""
    if values.dtype != np.float32:
        return 0
    return int(((values != 0) & (np.abs(values) < SMALLEST_NORMAL)).sum())


def flush_subnormals(values: np.ndarray) -> np.ndarray:
    """A float32 array with zeros in place of subnormal numbers."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.float32(0), values)


def without_subnormals(model: nn.Module) -> nn.Module:
    """A copy of the model in which no parameter or buffer is subnormal. Its outputs change by rounding only."""
    model = copy_module(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float32:
                tensor.masked_fill_(tensor.abs() < SMALLEST_NORMAL, 0.0)
    return model
