"""A file beside the model that it was made from: do they compute the same?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import ExportError

# Runtimes add in another order, so a file and its model agree in float32's own digits only.
TOLERANCE = 1e-4


def largest_difference(
    name: str, compute: Callable[[np.ndarray], np.ndarray], model: nn.Module, inputs: Sequence[Tensor]
) -> float:
    """The largest difference between a file and the model in PyTorch, over these inputs.

    Args:
        name: the file, for messages.
        compute: what the file gives for an input; an error of its is raised as one of ours.
        model: gives floats, or levels 0 to 255 as uint8, of which a rounding may move any by one.
        inputs: a batch each, float32 or uint8.

    Raises:
        ExportError: the file cannot be run, gives another type or shape, or differs by more than
            1e-4 · max(1, max|output|), or by more than one level.
    """
    model = copy.deepcopy(model).cpu().eval()
    worst = 0.0
    for batch in inputs:
        batch = batch.detach().cpu()
        with torch.inference_mode():
            wanted = model(batch).numpy()
        shape = "×".join(map(str, batch.shape))
        try:
            given = compute(batch.numpy())
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExportError(f"{name} cannot be run on an input of {shape}: {reason}") from error
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise ExportError(
                f"{name} gives {given.dtype} {given.shape} for an input of {shape}, the model {wanted.dtype} "
                f"{wanted.shape}"
            )
        levels = wanted.dtype == np.uint8
        gap = float(np.abs(given.astype(np.float64) - wanted.astype(np.float64)).max())
        worst = max(worst, gap)
        if not gap <= (1 if levels else TOLERANCE * max(1.0, float(np.abs(wanted).max()))):
            raise ExportError(
                f"{name} differs from the model by {gap:.2g}{' levels' if levels else ''} on an input of {shape}"
            )
    return worst
