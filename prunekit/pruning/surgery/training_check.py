"""One training step of a slim model, to find code that only training runs and that needs the dense model's channels."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.operations.meta import to_meta
from prunekit.pruning.graph.trace import tensors_in
from prunekit.pruning.surgery.copies import clone
from prunekit.utils.inputs import Example, call, cast, map_tensors
from prunekit.utils.text import first_line

_LIBRARIES = ("/torch/", "/prunekit/pruning/")


def check_training(dense: nn.Module, slim: nn.Module, batch: Example) -> None:
    """Run a forward and a backward pass of the slim model in train mode; it is changed.

    Raises:
        PlanError: it fails, or its outputs have other shapes, and the dense model does not.
    """
    try:
        shapes, problem = _step(slim, batch), None
    except Exception as error:  # It is the user's code and may raise anything.
        shapes, problem = [], f"{first_line(error)}{_place(error)}"
    try:
        expected = _shapes(dense, batch) if problem is None else _step(clone(dense), batch)
    except Exception:
        return
    if problem is None and shapes != expected:
        problem = f"outputs of shapes {shapes}, not {expected}"
    if problem is not None:
        raise PlanError(
            f"the slim model passes the equivalence check, but fails in train mode: {problem}; use a module for what "
            "reads the channels there, or keep them (ignored_layers)"
        )


def _shapes(model: nn.Module, batch: Example) -> list[tuple[int, ...]]:
    """The shapes of the outputs in train mode, without computing them where the model does not read values."""
    try:
        return _step(to_meta(model), map_tensors(lambda tensor: tensor.to("meta"), batch))
    except Exception:
        return _step(clone(model), batch)


def _step(model: nn.Module, batch: Example) -> list[tuple[int, ...]]:
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = tensors_in(call(model.train(), map_tensors(Tensor.clone, cast(batch, first.dtype))))
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
