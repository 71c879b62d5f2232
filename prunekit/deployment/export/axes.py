"""The input axes whose length a file leaves free: the batch and the sides, as far as model and exporter allow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from prunekit.deployment.values import Inputs, accepted, as_inputs
from prunekit.errors import ExportError

Free = Literal["all", "batch", "none"]
File = TypeVar("File")
_SIDES = {3: ("L",), 4: ("H", "W"), 5: ("D", "H", "W")}


def free_axes(value: Tensor, free: Free = "all") -> dict[int, str]:
    """Axis → name of the free axes of an input: N, and L, H and W, or D, H and W.

    Channels come second; last in images (N, H, W, C) of uint8.
    """
    if free == "none" or not value.dim():
        return {}
    sides = _SIDES.get(value.dim(), ()) if free == "all" else ()
    first = 1 if value.dtype == torch.uint8 else 2
    return {0: "N", **{first + index: name for index, name in enumerate(sides)}}


def dynamic_shapes(model: nn.Module, inputs: Sequence[Tensor], free: Free) -> tuple[Any, ...]:
    """The free axes as torch.export wants them: those of ``*args`` of the model's forward in a tuple of their own."""
    shapes = tuple(dict.fromkeys(free_axes(value, free), torch.export.Dim.DYNAMIC) for value in inputs)
    for index, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return *shapes[:index], shapes[index:]
    return shapes


def other_sizes(inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The inputs with other sides: smaller and larger odd ones, and twice the length."""
    changes: list[Callable[[int, int], int]] = [
        lambda side, index: side - (3, 5, 1)[index] if side > 8 else side - 1,
        lambda side, index: side + (13, 6, 3)[index],
        lambda side, _: 2 * side,
    ]
    return [tuple(_resized(value, change) for value in inputs) for change in changes]


def _resized(value: Tensor, change: Callable[[int, int], int]) -> Tensor:
    for index, axis in enumerate(axis for axis in free_axes(value) if axis):
        length = value.shape[axis]
        value = value.index_select(axis, torch.arange(max(1, change(length, index))) % length)
    return value.contiguous()


def export_with_free_axes(
    export: Callable[[Free], File],
    check: Callable[[File, list[tuple[Tensor, ...]]], object],
    model: nn.Module,
    example: Inputs,
) -> File:
    """Export with all axes free, else with a free batch, else with the sizes of the example.

    Args:
        export: makes the file.
        check: compares it with the model on some inputs.
        model: free are only axes that it takes other lengths of.
        example: its inputs.

    Raises:
        ExportError: no file can be made.
    """
    for free, inputs in _attempts(model, as_inputs(example)):
        try:
            file = export(free)
            if free != "none":
                check(file, inputs)
            return file
        except ExportError as error:
            failure = error
    raise failure


def _attempts(model: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[Free, list[tuple[Tensor, ...]]]]:
    one_more = tuple(torch.cat([value, value[:1]]) if value.dim() else value for value in inputs)
    batches = accepted(model, [one_more])
    sizes = accepted(model, other_sizes(inputs)) if batches and any(len(free_axes(v)) > 1 for v in inputs) else []
    if sizes:
        yield "all", sizes + batches
    if batches:
        yield "batch", batches
    yield "none", []
