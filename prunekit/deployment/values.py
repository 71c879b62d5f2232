"""The inputs and outputs of a model: one tensor or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunekit.errors import ExportError
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line

_TOLERANCE = ContextVar("tolerance", default=1e-4)  # Runtimes add in another order.
UNTRAINED_TOLERANCE = 1e-2  # An untrained network may amplify rounding errors.
Inputs = Tensor | Sequence[Tensor]


def as_inputs(example: Inputs) -> tuple[Tensor, ...]:
    """The inputs on the CPU, floats in float32."""
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ExportError("the example must be a tensor, or a tuple of tensors for a model with several inputs")
    return tuple(
        value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu() for value in inputs
    )


def shape_text(inputs: Inputs) -> str:
    return ", ".join("×".join(map(str, value.shape)) for value in as_inputs(inputs))


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode, in float32 on the CPU, without gradients and wrappers for training."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module  # The first is of torch.compile.
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise ExportError("the model is on the meta device and has no weights; load them with load_state_dict first")
    try:
        with torch.no_grad():
            model = copy_module(model).cpu().float().eval()
        return model if isinstance(model, torch.jit.ScriptModule) else model.requires_grad_(False)
    except Exception as error:  # Modules may hold anything.
        raise ExportError(f"the model cannot be copied: {first_line(error)}") from error


def output_tensors(value: Any) -> list[Tensor]:
    """The tensors of an output: a tensor, or tuples, lists and dicts of them in their order; None is left out."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ExportError(
                f"the model returns {type(leaf).__name__}; return a tensor, or a tuple, list or dict of tensors"
            )
    return leaves


def compute(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that the model returns; raises ExportError if it fails or returns none."""
    inputs = as_inputs(inputs)
    try:
        with torch.inference_mode():
            # Clones, since a model may change its input.
            outputs = output_tensors(model(*(value.clone() for value in inputs)))
    except ExportError:
        raise
    except Exception as error:  # The model's code may raise anything.
        raise ExportError(f"the model fails on an input of {shape_text(inputs)}: {first_line(error)}") from error
    if not outputs:
        raise ExportError("the model returns no tensor")
    return outputs


def output_names(model: nn.Module, inputs: Sequence[Tensor]) -> list[str]:
    """A name for each output tensor: "output", or the keys of a dict, or "output_0", …"""
    with torch.inference_mode():
        paths = [path for path, leaf in pytree.tree_flatten_with_path(model(*inputs))[0] if leaf is not None]
    names = []
    for path in paths:
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        names.append(
            "_".join(parts if isinstance(path[0] if path else None, pytree.MappingKey) else ["output", *parts])
        )
    return names if len(names) > 1 else ["output"]


def accepted(model: nn.Module, batches: Sequence[Inputs]) -> list[tuple[Tensor, ...]]:
    """Those of the inputs that the model can take."""
    taken = []
    for batch in batches:
        with suppress(ExportError):
            compute(model, batch)
            taken.append(as_inputs(batch))
    return taken


@contextmanager
def tolerance(relative: float) -> Iterator[None]:
    """Compare outputs with another relative tolerance than 1e-4 within the block."""
    token = _TOLERANCE.set(relative)
    try:
        yield
    finally:
        _TOLERANCE.reset(token)


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, bool]:
    """The largest absolute difference, and whether each is at most ``tolerance`` · max(1, max|expected|)."""
    if [value.shape for value in outputs] != [value.shape for value in expected]:
        return float("inf"), False
    largest, close = 0.0, True
    for value, wanted in zip(outputs, expected, strict=True):
        if not wanted.numel():
            continue
        worst = float((value.double() - wanted.double()).abs().max())
        close &= worst <= _TOLERANCE.get() * max(1.0, float(wanted.double().abs().max()))
        largest = largest if worst <= largest or largest != largest else worst  # NaN is kept.
    return largest, close
