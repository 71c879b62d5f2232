"""Multiply-adds of the operations of a model: convolutions, linear layers, products of matrices and attention.

Whatever calls them counts: a layer, a function with a bare parameter, or a product of two activations. Operations that
consist of others, such as ``einsum`` or an LSTM, count as those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.operations.keys import OperationKeys, operation_name, without_fast_path
from prunekit.operations.meta import to_meta
from prunekit.operations.shapes import fast_result
from prunekit.utils.copying import copy_module, restored
from prunekit.utils.inputs import Example, call, on_meta

T = TypeVar("T")
Key = tuple[str, str, int]  # the module, the operation, and the number of its calls of this operation
_CONVOLUTIONS = ("convolution", "_convolution", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))
_MATRICES = ("matmul", "mm", "bmm", "mv", "dot", "vdot")
_SUMS = ("addmm", "baddbmm", "addmv")  # with a product of matrices
_NAMES = {"linear", *_CONVOLUTIONS, *_MATRICES, *_SUMS}
# They multiply, but how often is not known. Nor is it of operations of other libraries.
_UNKNOWN = {"_trilinear", "_cdist_forward", "_euclidean_dist", "addbmm", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"}
_KNOWN_LIBRARIES = ("aten", "prim", "prims", "profiler")


@dataclass
class MultiplyAdds:
    """What a model does for one batch.

    Attributes:
        products: the multiply-adds of each call of an operation; an attention is two products.
        unknown: the modules that call operations whose multiply-adds are not known.
    """

    products: dict[Key, list[int]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)

    def of_modules(self) -> dict[str, int]:
        """The sum of each module that calls an operation with multiply-adds."""
        sums: dict[str, int] = {}
        for (module, _, _), numbers in self.products.items():
            sums[module] = sums.get(module, 0) + sum(numbers)
        return sums


def is_counted(name: str) -> bool:
    """Return whether an operation has multiply-adds."""
    return name.removesuffix("_") in _NAMES or "scaled_dot_product" in name


def loops(name: str, args: Any, output: Any) -> list[list[tuple[Any, int]]]:
    """The axes over which an operation multiplies: one list for each product of tensors that it is.

    The lengths of a list's axes multiplied are the multiply-adds.

    Args:
        name: of an operation that is counted, such as "conv2d".
        args: of the call; tensors, or what has a ``shape`` like them.
        output: the first tensor that it returns.

    Returns:
        pairs of an argument or the output, and an axis of it.
    """
    name = name.removesuffix("_")
    if "scaled_dot_product" in name:
        query, keys = args[:2]
        positions = (keys, len(keys.shape) - 2)
        return [[*_axes(output)[:-1], positions, (query, len(query.shape) - 1)], [*_axes(output), positions]]
    if name in _MATRICES or name in _SUMS:
        rows = args[name in _SUMS]
        return [[*_axes(output), (rows, len(rows.shape) - 1)]]
    value, weight = args[:2]
    if "transpose" in name or (name.endswith("convolution") and args[6]):
        output = value  # each entry of the input meets the kernel, rather than each of the output
    # The second axis of a weight has the channels of one group alone.
    return [[*_axes(output), *_axes(weight)[min(len(weight.shape) - 1, 1) :]]]


def _axes(value: Any) -> list[tuple[Any, int]]:
    return [(value, axis) for axis in range(len(value.shape))]


def multiply_adds(model: nn.Module, batch: Example) -> MultiplyAdds:
    """Count the multiply-adds of a model for a batch; on the meta device where the model runs there.

    Args:
        model: not changed.
        batch: its input.
    """

    def count(runner: nn.Module, given: Example, context: Callable[[], Any]) -> MultiplyAdds:
        mode = _CountingMode(runner)
        with context(), without_fast_path(), mode.hooks(), mode:
            call(runner, given)
        if runner is not model and len(mode.calls) < 2 and any(True for _ in model.children()):
            raise RuntimeError("the copy calls the modules of the model")
        return mode.found

    return on_shapes(model, batch, count)


def on_shapes(model: nn.Module, batch: Example, run: Callable[[nn.Module, Example, Callable[[], Any]], T]) -> T:
    """Return what ``run`` finds about shapes: on the meta device, or else on a copy of the model, or on the model.

    Args:
        run: is given a model in eval mode, a batch, and a context in which to run the model on it.
    """
    with suppress(Exception):
        return run(to_meta(model).eval(), on_meta(batch), torch.inference_mode)
    with suppress(Exception):
        return run(copy_module(model).eval(), batch, torch.inference_mode)
    with restored(model):
        with suppress(Exception):
            return run(model.eval(), batch, torch.inference_mode)
        # It differentiates in its forward, for example.
        return run(model.eval(), batch, torch.no_grad)


class _CountingMode(TorchDispatchMode, OperationKeys):
    def __init__(self, model: nn.Module):
        TorchDispatchMode.__init__(self)
        OperationKeys.__init__(self, model)
        self.found = MultiplyAdds()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = operation_name(func), kwargs or {}
        result = fast_result(name, args, kwargs)
        counted = is_counted(name)
        if result is None and not counted:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            if func.namespace not in _KNOWN_LIBRARIES or name in _UNKNOWN:
                self.found.unknown.add(self.running[-1])
        if result is None:
            result = func(*args, **kwargs)
        if counted:
            parts = loops(name, args, result if isinstance(result, Tensor) else result[0])
            self.found.products[self.next(name)] = [math.prod(x.shape[axis] for x, axis in part) for part in parts]
        return result
