"""Compare an exported file with its model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import ExportError

TOLERANCE = 1e-4  # Runtimes add in another order.


def max_abs_difference(
    name: str, compute: Callable[[np.ndarray], np.ndarray], model: nn.Module, inputs: Sequence[Tensor]
) -> float:
    """The largest difference between the outputs (floats, or uint8 levels) of the file ``name`` and of its model.

    Raises:
        ExportError: the file cannot be run, its output has another dtype or shape, or floats differ by more than
            1e-4 · max(1, max|output|), or levels by more than 1.
    """
    model = copy.deepcopy(model).cpu().eval()
    largest = 0.0
    for batch in inputs:
        batch = batch.detach().cpu()
        with torch.inference_mode():
            expected = model(batch).numpy()
        shape = "×".join(map(str, batch.shape))
        try:
            output = compute(batch.numpy())
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(f"{name} cannot be run on an input of {shape}: {reason}") from error
        if output.shape != expected.shape or output.dtype != expected.dtype:
            raise ExportError(
                f"{name} returns {output.dtype} {output.shape} for an input of {shape}, the model {expected.dtype} "
                f"{expected.shape}"
            )
        levels = expected.dtype == np.uint8
        difference = float(np.abs(output.astype(np.float64) - expected.astype(np.float64)).max())
        largest = max(largest, difference)
        if not difference <= (1 if levels else TOLERANCE * max(1.0, float(np.abs(expected).max()))):
            raise ExportError(
                f"{name} differs from the model by {difference:.2g}{' levels' if levels else ''} on an input of {shape}"
            )
    return largest
