"""A record of the operations of a model, as a dispatch mode sees them.

In inference mode nothing is decomposed: a linear layer, a norm and an attention are one operation each. The operations
run on the meta device, so that they cost no arithmetic, unless the model reads values. Gradients, dtypes and the
structure of the input do not matter.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunekit.operations.keys import OperationKeys, operation_name
from prunekit.operations.shapes import fast_result
from prunekit.pruning.graph.axis_terms import Term
from prunekit.utils.inputs import Example, call, tensors_of

MAX_NUMBERS = 64
_MAKES_TENSOR = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")


@dataclass(eq=False)
class Value:
    """A tensor of the record. One that an operation changes in place is another value after it."""

    shape: tuple[int, ...]
    name: str | None = None  # of the parameter or buffer that it is
    is_constant: bool = True  # whether it does not depend on the input
    is_mask: bool = False  # of booleans
    is_index: bool = False  # of whole numbers
    axes: list[Term] = field(default_factory=list)
    numbers: list[float] | None = None  # of a small constant, such as torch.tensor(…)


@dataclass(eq=False)
class Op:
    """A call of an operation."""

    name: str  # without the namespace and the overload: "conv2d", "add_"
    func: Any
    args: tuple[Any, ...]  # tensors are values
    kwargs: dict[str, Any]
    outputs: list[Value]  # those that are tensors, in order
    module: str  # the innermost module that is running
    number: int  # of the calls of this operation by this module, from 0
    line: str  # of the user's code
    inputs: list[Value]  # the values among its arguments

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def __repr__(self) -> str:
        return f"Op({self.name}, {self.module}, {[value.shape for value in self.outputs]})"


@dataclass
class Record:
    """What a model does."""

    ops: list[Op]
    inputs: list[Value]
    outputs: list[Value]
    tensors: dict[str, Value]  # parameters and buffers by name, one name each
    calls: Counter[str]  # of modules
    returned: str  # the type of what the model returns


def record(
    model: nn.Module,
    example: Example,
    outputs_of: Callable[[Any], list[Tensor]],
    is_known: Callable[[str, Any], bool],
) -> Record:
    """Run a model and record what it does.

    What the model raises gets an attribute ``ops``: the operations before.

    Args:
        model: in the mode in which it should run; it may be on the meta device.
        example: its arguments.
        outputs_of: the tensors in what the model returns.
        is_known: whether an operation is recorded as it is; others are as the operations that they consist of.
    """
    mode = _RecordingMode(model, is_known)
    tensors = tensors_of(example)
    inputs = [
        mode.add(t, Value(tuple(t.shape), is_constant=False, is_index=not t.is_floating_point())) for t in tensors
    ]
    try:
        with mode.hooks(), mode, _NumbersMode(mode):
            result = call(model, example)
    except Exception as error:
        error.ops = mode.ops  # type: ignore[attr-defined]
        raise
    outputs = [value for tensor in outputs_of(result) if (value := mode.values.get(id(tensor))) is not None]
    return Record(mode.ops, inputs, outputs, mode.tensors, mode.calls, type(result).__name__)


class _RecordingMode(TorchDispatchMode, OperationKeys):
    def __init__(self, model: nn.Module, is_known: Callable[[str, Any], bool]):
        TorchDispatchMode.__init__(self)
        OperationKeys.__init__(self, model)
        self.is_known = is_known
        self.ops: list[Op] = []
        self.values: dict[int, Value] = {}  # by the id of the tensor
        self.tensors: dict[str, Value] = {}
        self._alive: dict[int, Tensor] = {}  # so that no id is used twice
        self._roots: dict[int, int] = {}  # tensor → the tensor that it is a view of
        self._views: dict[int, list[Tensor]] = defaultdict(list)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) not in self.values:
                self.tensors[name] = self.add(tensor, Value(tuple(tensor.shape), name))

    def add(self, tensor: Tensor, value: Value) -> Value:
        self._alive[id(tensor)] = tensor
        self.values[id(tensor)] = value
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if not self.is_known(name, func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs: list[Value] = []
        given = self._with_values((args, kwargs), inputs)
        result = fast_result(name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        tensors = [result] if isinstance(result, Tensor) else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        is_constant = all(value.is_constant for value in inputs)
        written = self._written(func, args, kwargs)
        # Some return what they are given, such as ``contiguous`` of what is contiguous.
        new = [t for t in tensors if id(t) not in self.values or any(t is other for other in written)]
        outputs = [
            self.add(tensor, Value(tuple(tensor.shape), is_constant=is_constant, is_mask=tensor.dtype == torch.bool))
            for tensor in new
        ]
        if outputs:
            _, _, number = key = self.next(name)
            self.ops.append(Op(name, func, *given, outputs, key[0], number, _line(), inputs))
        self._follow_views(func, args, tensors, written)
        return result

    def _with_values(self, argument: Any, found: list[Value]) -> Any:
        """Return an argument with values in place of tensors, which are added to ``found``."""
        if isinstance(argument, Tensor):
            found.append(self.value(argument))
            return found[-1]
        if isinstance(argument, tuple | list):
            return type(argument)([self._with_values(part, found) for part in argument])
        if isinstance(argument, dict):
            return {key: self._with_values(part, found) for key, part in argument.items()}
        return argument

    def value(self, tensor: Tensor) -> Value:
        known = self.values.get(id(tensor))
        if known is None:
            known = self.add(tensor, Value(tuple(tensor.shape), is_mask=tensor.dtype == torch.bool))
            if not tensor.is_meta and tensor.numel() <= MAX_NUMBERS:
                known.numbers = tensor.flatten().tolist()
        return known

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        schema = func._schema
        if not schema.is_mutable:
            return []
        values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        written = [values.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [tensor for tensor in tree_leaves(written) if isinstance(tensor, Tensor)]

    def _follow_views(self, func: Any, args: Any, results: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Remember what shares memory; what shares it with a tensor that was written to has changed, too."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        aliasing = any(argument.alias_info is not None for argument in func._schema.returns)
        if first is not None and aliasing and not written:
            root = self._roots.get(id(first), id(first))
            for tensor in results:
                if id(tensor) != root:
                    self._roots[id(tensor)] = root
                    self._views[root].append(tensor)
        for tensor in written:
            root = self._roots.get(id(tensor), id(tensor))
            if not self._views[root]:
                continue
            for other in (self._alive[root], *self._views[root]):
                if other is not tensor:
                    before = self.values[id(other)]
                    after = self.add(other, Value(before.shape, is_constant=False))
                    both, module = [before, self.values[id(tensor)]], self.running[-1]
                    self.ops.append(Op("_mutated", None, tuple(both), {}, [after], module, 0, _line(), both))


class _NumbersMode(TorchFunctionMode):
    """Notes the numbers of tensors that code makes on the meta device, which has none."""

    def __init__(self, recording: _RecordingMode):
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _MAKES_TENSOR and result.is_meta:
            data = kwargs["data"] if "data" in kwargs else args[func is Tensor.new_tensor]
            leaves = tree_leaves(data)
            if len(leaves) <= MAX_NUMBERS and all(isinstance(leaf, int | float) for leaf in leaves):
                self.recording.value(result).numbers = leaves
        return result


def _line() -> str:
    """The line of the user's code that is running."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
