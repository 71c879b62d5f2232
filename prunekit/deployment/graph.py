"""A traced model that passes can rewrite."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.values import Inputs, as_inputs, eval_copy
from prunekit.errors import ExportError
from prunekit.layers.octave_trace import Shapes
from prunekit.utils.text import first_line

ADDS = {torch.add, torch.Tensor.add, "add"}
POOLS = {F.max_pool2d, F.avg_pool2d}
COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
PURE_FUNCTIONS = {*POOLS, F.interpolate}


class UntraceableError(ExportError):
    """torch.fx cannot trace the model, or does not trace what it computes."""


class InferenceGraph:
    """The torch.fx graph of a copy of a model, in eval mode, in float32 on the CPU.

    Every module call has its own module, so a pass can change the weights of one call only. ``module`` is the graph as
    a callable module; ``shapes`` has the shape of each tensor on the first of the batch ``example``. Raises
    UntraceableError if torch.fx cannot trace the model, or the traced model gives other outputs.
    """

    def __init__(self, model: nn.Module, example: Inputs):
        root = eval_copy(model)
        self.example = tuple(value[:1] for value in as_inputs(example))
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        try:
            self.module = fx.symbolic_trace(root)
        except Exception as error:  # The model's code may raise anything.
            raise UntraceableError(f"torch.fx cannot trace the model: {first_line(error).split('. ')[0]}") from error
        for node in self.nodes:
            node.type = None  # A graph with string annotations cannot be pickled.
        self._simplify()
        try:
            with torch.inference_mode():
                interpreter = Shapes(self.module)
                output = interpreter.run(*(value.clone() for value in self.example))
                self.shapes = interpreter.shapes
                equal = _equal(output, root(*(value.clone() for value in self.example)))
        except Exception as error:
            raise UntraceableError(f"the traced model does not run: {first_line(error)}") from error
        if not equal:
            raise UntraceableError("the traced model gives other outputs than the model")
        self._simplify_by_shape()

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def output(self) -> fx.Node | None:
        """The node of the model's output; None if the output is not a single tensor."""
        value = next(node.args[0] for node in self.nodes if node.op == "output")
        return value if isinstance(value, fx.Node) else None

    def recompile(self) -> nn.Module:
        """Remove unused nodes and modules, and return the module."""
        self.module.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def module_of(self, node: Any, *types: type[nn.Module]) -> nn.Module | None:
        """The module that the node calls, if it is exactly of one of these types (no subclass)."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self.module.get_submodule(node.target)
        return module if type(module) in types else None

    def conv(self, node: Any) -> nn.Conv2d | None:
        """The zero-padded convolution that the node calls; None for any other node."""
        module = self.module_of(node, nn.Conv2d)
        return module if module is not None and module.padding_mode == "zeros" else None

    def is_function(self, node: Any, functions: Iterable[Callable[..., Any]]) -> bool:
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions

    def is_add(self, node: Any) -> bool:
        """Whether the node adds two values of the same shape."""
        return (
            isinstance(node, fx.Node)
            and node.op in ("call_function", "call_method")
            and (node.target in ADDS or getattr(node.target, "__name__", "") in ("add", "iadd"))
            and len(node.args) == 2
            and not node.kwargs
            and all(isinstance(side, fx.Node) for side in node.args)
            and self.shapes.get(node.args[0]) is not None
            and self.shapes.get(node.args[0]) == self.shapes.get(node.args[1])
        )

    def is_cat(self, node: Any) -> bool:
        """Whether the node concatenates channels."""
        if not isinstance(node, fx.Node) or node.target not in (torch.cat, torch.concat):
            return False
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return dim == 1 and all(len(self.shapes.get(part, ())) == 4 for part in node.args[0])

    def is_outermost_sum(self, node: Any) -> bool:
        """Whether the node is an addition whose result is not just a term of another addition."""
        return self.is_add(node) and not (len(node.users) == 1 and self.is_add(next(iter(node.users))))

    def terms(self, total: fx.Node) -> list[fx.Node]:
        """The terms of a sum, including those of nested sums with no other user."""
        terms = []
        for side in total.args:
            nested = self.is_add(side) and len(side.users) == 1
            terms += self.terms(side) if nested else [side]
        return terms

    def insert_module(
        self, before: fx.Node, module: nn.Module, args: tuple[Any, ...], name: str, shape: tuple[int, ...]
    ) -> fx.Node:
        """Insert a call of a new module; ``shape`` is that of its output."""
        target = self._add_module(module, name)
        with self.module.graph.inserting_before(before):
            node = self.module.graph.call_module(target, args)
        self.shapes[node] = shape
        return node

    def insert_function(
        self, before: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], shape: tuple[int, ...] | None
    ) -> fx.Node:
        with self.module.graph.inserting_before(before):
            node = self.module.graph.call_function(function, args)
        if shape is not None:
            self.shapes[node] = shape
        return node

    def insert_sum(self, before: fx.Node, terms: Sequence[fx.Node]) -> fx.Node:
        """Insert the sum of one or more values of the same shape."""
        total = terms[0]
        for term in terms[1:]:
            total = self.insert_function(before, torch.add, (total, term), self.shapes[term])
        return total

    def replace(self, node: fx.Node, replacement: fx.Node) -> None:
        """Remove a node; its users read the replacement instead."""
        node.replace_all_uses_with(replacement)
        self.module.graph.erase_node(node)

    def _add_module(self, module: nn.Module, name: str) -> str:
        target = name.replace(".", "_")
        while hasattr(self.module, target):
            target += "_"
        self.module.add_submodule(target, module.eval().requires_grad_(False))
        return target

    def _simplify(self) -> None:
        """Give each call its own module, and operations one form: positional inputs, reshape, F.relu; no dropout."""
        seen: set[str] = set()
        for node in self.nodes:
            if node.op == "call_module":
                if node.target in seen:
                    module = copy.deepcopy(self.module.get_submodule(node.target))
                    node.target = self._add_module(module, f"{node.target}_again")
                seen.add(node.target)
        for node in self.nodes:
            if node.op in ("call_module", "call_function") and not node.args and "input" in node.kwargs:
                node.args = (node.kwargs["input"],)
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "input"}
            if node.op == "call_method" and node.target == "view" and not _casts(node):
                node.target = "reshape"  # A view fails on channels-last memory.
        for node in self.nodes:
            if self.module_of(node, nn.Identity, nn.Dropout, nn.Dropout2d) is not None and len(node.args) == 1:
                self.replace(node, node.args[0])
            elif self.module_of(node, nn.ReLU) is not None or self._is_pure_relu(node):
                self.replace(node, self.insert_function(node, F.relu, node.args, None))
            elif (pool := self._max_pool1d(node)) is not None:
                sides = [(1, option) for option in (pool.kernel_size, pool.stride)]
                planar = nn.MaxPool2d(*sides, (0, pool.padding), (1, pool.dilation), ceil_mode=pool.ceil_mode)
                rows = self.insert_function(node, torch.unsqueeze, (node.args[0], -2), None)
                pooled = self.insert_module(node, planar, (rows,), f"{node.name}_planar", ())
                self.replace(node, self.insert_function(node, torch.squeeze, (pooled, -2), None))
        self.recompile()

    def _simplify_by_shape(self) -> None:
        """Drop checks of the number of axes, which count as users of a value, and make F.batch_norm a module."""
        for node in self.nodes:
            shape = self.shapes.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
            if shape is not None and (node.target in ("dim", "ndimension") or _is_attribute(node, "ndim")):
                self._replace_by_value(node, len(shape))
            elif self.is_function(node, COMPARISONS) and not node.all_input_nodes:
                self._replace_by_value(node, node.target(*node.args))
            elif self.is_function(node, [torch._assert]) and node.args[:1] == (True,):
                self.module.graph.erase_node(node)
            elif self.is_function(node, [F.batch_norm]) and shape is not None and len(shape) == 4:
                call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
                call.apply_defaults()
                if (norm := self._norm(call.arguments)) is not None:
                    name = call.arguments["running_mean"].target.rpartition(".")[0] or "norm"
                    self.replace(node, self.insert_module(node, norm, (node.args[0],), name, self.shapes[node]))
        self.recompile()

    def _replace_by_value(self, node: fx.Node, value: Any) -> None:
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda used: value if used is node else used)
        self.module.graph.erase_node(node)

    def _norm(self, options: Mapping[str, Any]) -> nn.BatchNorm2d | None:
        """The norm with these arguments of F.batch_norm; None if it has no statistics or computes its tensors."""
        names = ("running_mean", "running_var", "weight", "bias")
        nodes = [options[name] for name in names]
        if (
            options["training"]
            or None in nodes[:2]
            or any(node is not None and node.op != "get_attr" for node in nodes)
        ):
            return None
        tensors = [None if node is None else self._attribute(node.target) for node in nodes]
        norm = nn.BatchNorm2d(len(tensors[0]), options["eps"])
        with torch.no_grad():
            for name, tensor in zip(names, tensors, strict=True):
                if tensor is not None:
                    getattr(norm, name).copy_(tensor)
        return norm

    def _attribute(self, target: str) -> Tensor:
        owner, _, name = target.rpartition(".")
        return getattr(self.module.get_submodule(owner), name)

    @staticmethod
    def _is_pure_relu(node: fx.Node) -> bool:
        return (node.op, node.target) in (("call_function", torch.relu), ("call_method", "relu"))

    def _max_pool1d(self, node: fx.Node) -> nn.MaxPool1d | None:
        """The max-pooling over a length, which torch.export fixes, unlike that over a plane."""
        pool = self.module_of(node, nn.MaxPool1d)
        if pool is None and self.is_function(node, [F.max_pool1d]):
            pool = nn.MaxPool1d(*node.args[1:], **node.kwargs)
        if pool is None or pool.return_indices:
            return None
        lengths = pool.kernel_size, pool.stride, pool.padding, pool.dilation
        return pool if all(isinstance(length, int) for length in lengths) else None


def _equal(output: Any, expected: Any) -> bool:
    # Not torch.testing: it imports 50 MB into processes whose memory is measured.
    if isinstance(expected, Tensor):
        comparable = isinstance(output, Tensor) and output.shape == expected.shape and output.dtype == expected.dtype
        return comparable and torch.allclose(output, expected, rtol=1.3e-6, atol=1e-5, equal_nan=True)
    if isinstance(expected, dict):
        return output.keys() == expected.keys() and all(_equal(output[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(output) == len(expected) and all(map(_equal, output, expected))
    return output == expected


def _is_attribute(node: fx.Node, name: str) -> bool:
    return (node.op, node.target) == ("call_function", getattr) and node.args[1:] == (name,)


def _casts(view: fx.Node) -> bool:
    return any(isinstance(value, torch.dtype) for value in (*view.args, *view.kwargs.values()))


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether the convolution has one filter for each channel."""
    return conv.groups == conv.in_channels == conv.out_channels > 1


@dataclass(frozen=True)
class Pooling:
    """Pooling without padding; kernel and stride as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    ceil_mode: bool


def parse_pooling(node: fx.Node) -> Pooling | None:
    """The pooling that a call of one of ``POOLS`` computes; None if it uses other options."""
    options = {**dict(zip(("x", "kernel_size", "stride"), node.args, strict=False)), **node.kwargs}
    fixed = {"padding": 0, "dilation": 1, "return_indices": False, "count_include_pad": True, "divisor_override": None}
    if len(node.args) > 3 or any(options.get(key, value) != value for key, value in fixed.items()):
        return None
    kernel = options["kernel_size"]
    stride = kernel if options.get("stride") is None else options["stride"]
    kernel, stride = (side if isinstance(side, tuple) else (side, side) for side in (kernel, stride))
    return Pooling(kernel, stride, bool(options.get("ceil_mode", False)))
