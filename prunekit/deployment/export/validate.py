"""Compare an exported file with its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.deployment.values import Inputs, as_inputs, compute, difference, shape_text
from prunekit.errors import ExportError
from prunekit.utils.copying import copy_module
from prunekit.utils.text import one_line


def max_abs_difference(name: str, function: Callable[..., Any], model: nn.Module, inputs: Sequence[Inputs]) -> float:
    """The largest difference between the outputs (floats, or uint8 levels) of the file ``name`` and of its model.

    Args:
        name: of the file.
        function: the file as a function of arrays; it returns an array or a list of them.
        model: the model.
        inputs: what to compare on; a tuple for several inputs.

    Raises:
        ExportError: the model or the file cannot be run, an output has another dtype or shape, or floats differ by more
            than 1e-4 · max(1, max|output|), or levels by more than 1.
    """
    model = copy_module(model).cpu().eval()
    largest = 0.0
    for batch in inputs:
        expected = [value.numpy() for value in compute(model, batch)]
        shape = shape_text(batch)
        try:
            given = function(*(value.numpy() for value in as_inputs(batch)))
        except Exception as error:
            raise ExportError(f"{name} cannot be run on an input of {shape}: {one_line(error)}") from error
        outputs = list(given) if isinstance(given, list | tuple) else [given]
        if len(outputs) != len(expected):
            raise ExportError(f"{name} has {len(outputs)} outputs, the model {len(expected)}")
        for output, wanted in zip(outputs, expected, strict=True):
            if output.shape != wanted.shape or output.dtype != wanted.dtype:
                raise ExportError(
                    f"{name} returns {output.dtype} {output.shape} for an input of {shape}, the model {wanted.dtype} "
                    f"{wanted.shape}"
                )
            levels = wanted.dtype == np.uint8
            worst, close = difference([torch.from_numpy(output)], [torch.from_numpy(wanted)])
            largest = max(largest, worst)
            if not (worst <= 1 if levels else close):
                again = [value.numpy() for value in compute(model, batch)]
                if any(not np.array_equal(*pair, equal_nan=True) for pair in zip(expected, again, strict=True)):
                    raise ExportError("the model gives other outputs at each call; remove what is random in eval mode")
                raise ExportError(
                    f"{name} differs from the model by {worst:.2g}{' levels' if levels else ''} on an input of {shape}"
                )
    return largest
