"""Tracing: the records of what a model does in eval and in train mode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.operations.keys import without_fast_path
from prunekit.operations.meta import to_meta
from prunekit.pruning.graph.recorder import Record, record
from prunekit.pruning.graph.rules.base import find_rule
from prunekit.utils.copying import copy_module, restored
from prunekit.utils.inputs import Example, as_example, describe_shapes, first_inputs, map_tensors, on_meta, tensors_of
from prunekit.utils.text import first_line


@dataclass
class Trace:
    """What a model does."""

    model: nn.Module  # the one that ran, in eval mode
    example: Example  # what it ran on
    record: Record
    train_record: Record | None  # of the train mode, where that calls modules which the eval mode does not


def trace(model: nn.Module, example: Example) -> Trace:
    """Trace a model on an example of its inputs. Its mode, hooks, buffers and gradients are left unchanged.

    Raises:
        PlanError: the model fails on the example.
    """
    example = map_tensors(Tensor.detach, as_example(example))
    _check_arguments(model, example)
    try:
        # Only shapes are needed, so a copy runs on the meta device, unless the model reads values.
        # Training makes modules forget what they have kept in eval mode.
        runner, batch = to_meta(model).train().eval(), on_meta(example)
        # A copy of it runs, since the model may keep something.
        found = record_call(copy_module(runner), batch)
    except Exception:
        batch = map_tensors(Tensor.clone, first_inputs(example, 2))
        try:
            runner, found = _record_values(model, batch)
        except Exception as error:  # It is the user's code and may raise anything.
            raise _failure(example, error) from error
    if not found.outputs:
        what = f"it returns {found.returned}, in which no tensor was found; return tensors"
        raise PlanError(f"the model fails on {describe_shapes(example)}: {what}")
    if all(value.is_constant for value in found.outputs):
        raise PlanError(f"the model fails on {describe_shapes(example)}: its output does not depend on its input")
    return Trace(runner, batch, found, _train_record(runner, batch, found))


def _record_values(model: nn.Module, batch: Example) -> tuple[nn.Module, Record]:
    """Record a model that reads values: a copy of it, or itself where a copy cannot be made or runs other modules."""
    with suppress(Exception):
        runner = copy_module(model).train().eval()
        found = record_call(runner, batch)
        if any(value.name is not None for op in found.ops for value in op.inputs):
            return runner, found
    with restored(model):
        try:
            return model, record_call(model.eval(), batch)
        except Exception:
            # It differentiates in its forward, for example.
            return model, record_call(model.eval(), batch, torch.enable_grad)


def _failure(example: Example, error: Exception) -> PlanError:
    return PlanError(f"the model fails on {describe_shapes(example)}: {first_line(error)}")


def record_call(model: nn.Module, batch: Example, context: Callable[[], Any] = torch.inference_mode) -> Record:
    with context(), without_fast_path():
        return record(model, batch, tensors_in, lambda name, func: find_rule(name, func) is not None)


def _train_record(model: nn.Module, batch: Example, found: Record) -> Record | None:
    # A single number acts on all channels equally.
    owners = {name for name, m in model.named_modules() if any(p.numel() > 1 for p in m.parameters(False))}
    if owners <= set(found.calls):
        return None
    has_values = not tensors_of(batch)[0].is_meta
    try:
        with restored(model) if has_values else nullcontext():
            copied = copy_module(model) if has_values else model
            return record_call(copied.train(), batch)
    except Exception:
        return None  # For example, a model that needs targets in train mode.
    finally:
        if not has_values:
            model.eval()


def tensors_in(output: Any, _outer: tuple[Any, ...] = ()) -> list[Tensor]:
    """Return the tensors of a model's output: a tensor, or nested lists, tuples, mappings and objects of them."""
    if isinstance(output, Tensor):
        return [output]
    if any(output is other for other in _outer):
        return []
    _outer = (*_outer, output)
    if isinstance(output, Mapping):
        output = list(output.values())
    elif isinstance(output, Collection) and not isinstance(output, str | bytes):
        output = list(output)
    else:
        # A dataclass or another object of the user's; not a module, a function or a class.
        slots = [name for cls in type(output).__mro__ for name in getattr(cls, "__slots__", ())]
        plain = isinstance(output, nn.Module | type) or callable(output)
        names = () if plain else [*getattr(output, "__dict__", ()), *slots]
        output = [getattr(output, name, None) for name in names]
    return [tensor for part in output for tensor in tensors_in(part, _outer)]


def _check_arguments(model: nn.Module, example: Example) -> None:
    if isinstance(example, Tensor) and (example.dim() < 2 or example.dtype == torch.bool):
        what = f"the example is {tuple(example.shape)} of {example.dtype}"
        raise PlanError(f"{what}; pass a batch (N, C, …) of floats, or (N, L) of tokens")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise PlanError("the model has uninitialized lazy modules; run it once first")
