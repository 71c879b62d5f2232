"""A tape of the operations of a model on the meta device, which is played at other input sizes without the model.

It says all that the model does where the model's code never reads a size: then the same operations run at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WITHOUT_LENGTHS = torch.dtype | torch.device | torch.layout | None


class VariesError(Exception):
    """An operation returns another number of tensors at another size."""


@dataclass
class _Slot:
    """Stands in the arguments of a call for a tensor that is not a parameter."""

    index: int


@dataclass
class _Call:
    key: Any
    func: Any
    args: Any  # with slots
    kwargs: Any
    inputs: list[int]  # ids of tensors of the first run
    outputs: list[int]
    kind: tuple[str, ...]  # equal where a call does the same to inputs of the same shapes


class Tape:
    """What a run does.

    Args:
        model: on the meta device; its parameters and buffers are the same at each size.
    """

    def __init__(self, model: nn.Module):
        self._model, self._reads = model, False
        self._known: dict[tuple, tuple[Any, Any]] = {}  # results of calls

    def open(self, image: Tensor) -> None:
        """Begin a run."""
        self._constant = {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        self._calls: list[_Call] = []
        self._shapes: dict[int, torch.Size] = {}  # of tensors that are not parameters
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._input = self._register(image)

    def _register(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._shapes[id(tensor)] = tensor.shape
        return id(tensor)

    def add(self, key: Any, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Add a call; ``key`` is None where its effect is of no interest."""
        if self._reads:
            return
        outputs = _tensors(out)
        if outputs is None:
            self._reads |= not isinstance(out, _WITHOUT_LENGTHS) and not _is_plain(func)
            if key is None:
                return
        inputs: list[int] = []
        kind: list[str] = [str(id(func))]
        given = self._with_slots(args, inputs, kind), self._with_slots(kwargs, inputs, kind)
        made = [self._register(tensor) for tensor in outputs or ()]
        self._calls.append(_Call(key, func, *given, inputs, made, tuple(kind)))

    def close(self) -> bool:
        """End a run; return whether the tape says all."""
        return not self._reads

    def replay(self, image: Tensor, call: Callable[[Any, Any, Any], tuple[Any, Any]]) -> dict[Any, Any]:
        """Return the effects of the calls on another image, by key.

        Args:
            call: returns what a call returns, and its effect.
        """
        tensors, effects = {self._input: image}, {}
        for entry in self._calls:
            given = [tensors[name] for name in entry.inputs]
            known = entry.kind, *(tensor.shape for tensor in given)
            if known not in self._known:
                self._known[known] = call(entry.func, _filled(entry.args, given), _filled(entry.kwargs, given))
            out, effect = self._known[known]
            outputs = _tensors(out) or ()
            if len(outputs) != len(entry.outputs):
                self._reads = True
                raise VariesError
            tensors.update(zip(entry.outputs, outputs, strict=True))
            if entry.key is not None:
                effects[entry.key] = effect
        return effects

    def _with_slots(self, value: Any, inputs: list[int], kind: list[str]) -> Any:
        """Return arguments with slots; their tensors are added to ``inputs``, what they are to ``kind``."""
        if isinstance(value, Tensor):
            kind.append(str(tuple(value.shape)) if id(value) in self._constant else "")
            if id(value) in self._constant:
                return value
            # What comes from elsewhere, such as a scripted part, or has another shape than before, is not on the tape.
            self._reads |= self._shapes.get(id(value)) != value.shape
            inputs.append(id(value))
            return _Slot(len(inputs) - 1)
        if isinstance(value, tuple | list | dict):
            kind.append(f"{type(value).__name__} of {len(value)}")
        if isinstance(value, tuple | list):
            parts = [self._with_slots(part, inputs, kind) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, dict):
            kind += value
            return {name: self._with_slots(part, inputs, kind) for name, part in value.items()}
        kind.append(repr(value))
        return value


def _tensors(out: Any) -> Sequence[Tensor] | None:
    """The tensors that a call returns; None where it returns something else."""
    if isinstance(out, Tensor):
        return [out]
    is_plain = isinstance(out, tuple | list) and all(isinstance(tensor, Tensor) for tensor in out)
    return out if is_plain else None


def _is_plain(func: Any) -> bool:
    """Whether what a function or an attribute says of a tensor is not the length of an axis."""
    name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    return name in ("dim", "ndim", "requires_grad") or (name.startswith("is_") and name != "is_same_size")


def _filled(value: Any, given: Sequence[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return given[value.index]
    if isinstance(value, tuple | list):
        parts = [_filled(part, given) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {name: _filled(part, given) for name, part in value.items()}
    return value
