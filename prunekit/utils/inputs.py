"""Example inputs of a model: one tensor, a tuple of its arguments, or a dict of its keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def as_example(example: Any) -> Example:
    """Return an example with mappings as dicts, such as what a tokenizer returns.

    Raises:
        PlanError: it is neither a tensor nor a tuple or a mapping with tensors in it.
    """
    kinds = "pass a tensor, a tuple of the model's arguments, or a dict of its keyword arguments"
    if isinstance(example, Mapping):
        example = {str(name): value for name, value in example.items()}
    elif not isinstance(example, Tensor | tuple):
        raise PlanError(f"the example is {type(example).__name__}; {kinds}")
    if not tensors_of(example):
        raise PlanError(f"the example has no tensor; {kinds}")
    return example


def call(model: nn.Module, example: Example) -> Any:
    if isinstance(example, Tensor):
        return model(example)
    return model(**example) if isinstance(example, Mapping) else model(*example)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors in an example, also in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(function, part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a named tuple takes each
    return value


def on_meta(example: Example) -> Example:
    return map_tensors(lambda tensor: tensor.to("meta"), example)


def tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def batched(example: Example) -> list[Tensor]:
    """Return the arguments that are batches of equal length; none where the example does not say what a batch is."""
    if isinstance(example, Tensor):
        return [example]
    arguments = list(example.values() if isinstance(example, Mapping) else example)
    tensors = [value for value in arguments if isinstance(value, Tensor) and value.dim() > 1]
    nested = any(tensors_of(value) for value in arguments if not isinstance(value, Tensor))
    return tensors if not nested and len({len(tensor) for tensor in tensors}) == 1 else []


def batch_length(example: Example) -> int:
    """The number of inputs in an example; 1 where that is not known."""
    return len(found[0]) if (found := batched(example)) else 1


def first_inputs(example: Example, count: int) -> Example:
    """Return an example with at most so many inputs; the example itself where their number is not known."""
    rows = {id(tensor) for tensor in batched(example)}
    return map_tensors(lambda tensor: tensor[:count] if id(tensor) in rows else tensor, example)


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Give the floats of an example another dtype; tokens and masks keep theirs."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, example)


def shapes_of(example: Example) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors_of(example)]


def describe_shapes(example: Example) -> str:
    """The shapes of an example for messages: "an input of shape (2, 3, 32, 32)"."""
    shapes = [str(tuple(shape)) for shape in shapes_of(example)]
    return f"an input of shape {shapes[0]}" if len(shapes) == 1 else f"inputs of shapes {', '.join(shapes)}"


# In files, a tensor is {"shape": [1, 16], "dtype": "int64"}; tuples are lists.


def to_spec(value: Any) -> Any:
    """Return what JSON can hold of an example: shapes and dtypes instead of tensors.

    Raises:
        PlanError: an argument is neither a tensor nor a plain value.
    """
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"arguments": {name: to_spec(part) for name, part in value.items()}}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_spec(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PlanError(f"an argument of the model is {type(value).__name__}, which cannot be saved; pass plain values")


def from_spec(spec: Any) -> Any:
    """Return an example on the meta device. Raises ValueError where the specification is none of ``to_spec``."""
    if isinstance(spec, list):
        return tuple(from_spec(part) for part in spec)
    if not isinstance(spec, dict):
        return spec
    if spec.keys() == {"arguments"} and isinstance(spec["arguments"], dict):
        return {name: from_spec(part) for name, part in spec["arguments"].items()}
    shape, dtype = spec.get("shape"), getattr(torch, str(spec.get("dtype")), None)
    whole = isinstance(shape, list) and all(type(side) is int and 0 < side < 2**20 for side in shape)
    if spec.keys() != {"shape", "dtype"} or not whole or not isinstance(dtype, torch.dtype):
        raise ValueError(f"example: {spec} is not a tensor's shape and dtype")
    return torch.empty(shape, dtype=dtype, device="meta")
