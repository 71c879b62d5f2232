"""One training step of a slim model, to find code that only training runs and that needs the dense model's channels."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.operations.meta import FastShapes, to_meta
from prunekit.pruning.graph.trace import tensors_in
from prunekit.pruning.surgery.copies import copy_as
from prunekit.utils.inputs import Example, call, cast, map_tensors, on_meta, tensors_of
from prunekit.utils.text import first_line

LARGE = 200_000  # values of a batch, above which shapes alone are tried
_LIBRARIES = ("/torch/", "/prunekit/pruning/")


def check_training(dense: nn.Module, slim: nn.Module, batches: Sequence[Example]) -> None:
    """Run a forward and a backward pass of the slim model, in float32 on the CPU, in train mode; it is changed.

    Of large images only the shapes are computed, if the model does not read values.

    Args:
        batches: the first that the dense model accepts in train mode decides.

    Raises:
        PlanError: it fails, or its outputs have other shapes, and the dense model does not.
    """
    for batch in batches:
        try:
            shapes, problem = _trained(slim, batch), None
        except Exception as error:  # It is the user's code and may raise anything.
            shapes, problem = [], f"{first_line(error)}{_place(error)}"
        try:
            expected = _shapes(dense, batch) if problem is None else _step(copy_as(dense, torch.float32), batch)
        except Exception:
            continue
        if problem is None and shapes != expected:
            problem = f"outputs of shapes {shapes}, not {expected}"
        if problem is not None:
            raise PlanError(
                f"the slim model passes the equivalence check, but fails in train mode: {problem}; use a module for "
                "what reads the channels there, or keep them (ignored_layers)"
            )
        return


def _trained(model: nn.Module, batch: Example) -> list[tuple[int, ...]]:
    """The shapes of the outputs in train mode, after a backward pass."""
    if sum(tensor.numel() for tensor in tensors_of(batch)) > LARGE:
        with suppress(Exception):  # It reads values, or fails.
            return _step(to_meta(model), on_meta(batch))
    return _step(model, batch)


def _shapes(model: nn.Module, batch: Example) -> list[tuple[int, ...]]:
    """The shapes of the outputs in train mode, without computing them where the model does not read values."""
    try:
        with torch.no_grad(), FastShapes():
            return [tuple(tensor.shape) for tensor in _run(to_meta(model), on_meta(batch))]
    except Exception:
        return _step(copy_as(model, torch.float32), batch)


def _run(model: nn.Module, batch: Example) -> list[Tensor]:
    given = map_tensors(Tensor.clone, cast(batch, next(model.parameters()).dtype))
    return tensors_in(call(model.train(), given))


def _step(model: nn.Module, batch: Example) -> list[tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = _run(model, batch)
        losses = [tensor.double().sum() for tensor in outputs if tensor.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
    return [tuple(tensor.shape) for tensor in outputs]


def _place(error: Exception) -> str:
    """Where the user's code failed, in brackets."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not any(p in frame.filename for p in _LIBRARIES)
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
