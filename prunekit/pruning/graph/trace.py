"""The computation graph of a model: its modules and operations in topological order.

The trace follows autograd from the outputs back to the input, so it sees functional operations as well as modules
(Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunekit.errors import PlanError
from prunekit.pruning.graph.axes import CONVS, NORMS, TRANSPOSED, is_channelwise
from prunekit.pruning.graph.meta import FastShapes, to_meta
from prunekit.pruning.graph.off_path import off_path_readers, used_elsewhere
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line

SUMS = ("AddBackward0", "SubBackward0")
PRODUCT = "MulBackward0"

# The modules that are nodes. All other modules are seen through to their operations.
LAYERS = (
    *(*CONVS, *TRANSPOSED, *NORMS, nn.Linear, nn.PReLU),
    *(nn.LayerNorm, nn.GroupNorm),
    *(nn.Embedding, nn.MultiheadAttention, nn.LSTM),
)

# The functions that layers call.
_PRIMITIVES = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), CONVS),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED),
    **{F.linear: (nn.Linear,), F.prelu: (nn.PReLU,), F.batch_norm: NORMS, torch.batch_norm: NORMS},
    **{F.instance_norm: NORMS},
}

# Linear operations that keep a constant channel constant: a shift before them can be moved to a norm after them.
LINEAR_OPS = ("AddBackward0", "UpsampleBilinear2DBackward0", "UpsampleNearest2DBackward0", "UpsampleBicubic2DBackward0")


@dataclass
class Node:
    """A module call or an operation."""

    index: int
    name: str | None  # of the module; None for an operation
    op: str  # "conv", "depthwise", "transposed", "linear", "norm", "prelu", "input", or the autograd node's name
    module: nn.Module | None
    grad_fn: Any
    out_shape: tuple[int, ...] | None  # of the first output; None where autograd does not report it
    inputs: list[Node]
    parts: list[int]  # which output of each input node it reads
    outputs: list[Node] = field(default_factory=list)
    is_output: bool = False  # it computes an output of the model
    mixes_parameter: bool = False  # it combines a feature map with a parameter that belongs to no known layer
    # Shapes of constant tensors that it combines with a feature map, such as by a sum or a product.
    constants: list[tuple[int, ...]] = field(default_factory=list)

    is_chunk: bool = False  # it splits into so many parts, not at so many channels

    def __repr__(self) -> str:
        return f"Node({self.index}, {self.name or self.op})"

    @property
    def kind(self) -> str:
        """The operation without autograd's suffix, which differs where it works in place."""
        return self.op.rstrip("0123456789").removesuffix("Backward")

    def length(self, axis: int) -> int | None:
        """The length of an axis of the output; None where it is unknown, or there is no such axis."""
        return self.out_shape[axis] if self.out_shape and len(self.out_shape) > axis else None


@dataclass
class Graph:
    """The nodes that depend on the model's input, in topological order."""

    nodes: list[Node]
    reused: set[str]  # modules that are called more than once
    used_elsewhere: set[str]  # modules with a parameter that something else computes with, too
    off_path: list[tuple[str, Node]] = field(default_factory=list)  # (module off the path to the output, what it reads)

    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes if node.name}


def trace(model: nn.Module, example: Tensor) -> Graph:
    """Trace a model on a batch of inputs, (N, C, …). Its mode, hooks, buffers and gradients are left unchanged.

    Raises:
        PlanError: the model fails on the example.
    """
    _check_arguments(model, example)
    try:
        # Only shapes are needed, so a copy runs on the meta device, unless the model reads values.
        copied, batch = to_meta(model), example.detach().to("meta")
        graph = _trace(copied, batch)
    except Exception:
        with _restored(model):
            try:
                graph = _trace(model, example)
            except PlanError:
                # It differentiates in its forward, or calls layers under torch.vmap.
                graph = _trace(model, example, whole=False)
        try:
            copied, batch = copy_module(model), example
        except Exception:
            return graph
    nodes = graph.by_name()
    graph.off_path = [(name, nodes[producer]) for name, producer in off_path_readers(copied, batch, set(nodes))]
    return graph


def follow_chain(node: Node, ops: tuple[str, ...]) -> Node | None:
    """Return the first node after ``node`` that is not one of ``ops``; None where the chain branches or an addition
    scales a term."""
    while len(node.outputs) == 1 and not node.is_output and getattr(node.grad_fn, "_saved_alpha", 1) == 1:
        node = node.outputs[0]
        if node.op not in ops:
            return node
    return None


def tensors_in(output: Any, _outer: tuple[Any, ...] = ()) -> list[Tensor]:
    """Return the tensors of a model's output: a tensor, or nested lists, tuples, mappings and objects of them."""
    if isinstance(output, Tensor):
        return [output]
    if any(output is other for other in _outer):
        return []
    _outer = (*_outer, output)
    if isinstance(output, Mapping):
        output = list(output.values())
    elif not isinstance(output, list | tuple):
        # A dataclass or another object of the user's; not a module, a function or a class.
        slots = [name for cls in type(output).__mro__ for name in getattr(cls, "__slots__", ())]
        plain = isinstance(output, nn.Module | type) or callable(output)
        names = () if plain else [*getattr(output, "__dict__", ()), *slots]
        output = [getattr(output, name, None) for name in names]
    return [tensor for part in output for tensor in tensors_in(part, _outer)]


def _check_arguments(model: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor):
        raise PlanError(
            f"the example is a {type(example).__name__}; pass one tensor, a batch (for a model with several inputs, "
            "wrap it in a module that takes one)"
        )
    if example.dim() < 2 or not example.is_floating_point():
        raise PlanError(f"the example is {tuple(example.shape)} of {example.dtype}; pass a batch (N, C, …) of floats")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise PlanError("the model has uninitialized lazy modules; run it once first")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Undo on exit what forward and the tracer change in a model: attributes, modes, buffers and hooks."""
    saved = [
        (
            module,
            dict(vars(module)),
            dict(module._forward_hooks),
            {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attributes, hooks, buffers in saved:
                vars(module).clear()
                vars(module).update(attributes)
                module._forward_hooks.clear()
                module._forward_hooks.update(hooks)
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer.copy_(value)  # forward may have put another tensor in its place


class _OneOperation(torch.autograd.Function):
    """A function that is one operation to autograd, whatever it consists of."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return function(*tensors).clone()  # not a view, since autograd lets nothing change a view in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _OneOperation.apply(F.linear, input, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.instance_norm(x, running_mean, running_var, weight, bias, *options, **named)

    return _OneOperation.apply(call, input, weight, bias)


def _einsum(equation: str, *operands: Any) -> Tensor:
    return _OneOperation.apply(lambda *tensors: torch.einsum(equation, *tensors), *operands)


# Functions that autograd would decompose into reshapes and others.
_WHOLE = {F.linear: _linear, F.instance_norm: _instance_norm, torch.einsum: _einsum}
_CHUNK = (torch.chunk, Tensor.chunk)


class _Recorder(TorchFunctionMode):
    """Record which operation of a layer's forward is the layer itself, and which operations combine a feature map with
    a tensor that has no gradient; to autograd such a tensor looks like a number."""

    def __init__(self, model: nn.Module, whole: bool) -> None:
        super().__init__()
        self.model = model
        self.whole = _WHOLE if whole else {}
        self.names: dict[Any, str] = {}  # autograd node of a function of ``whole`` → its name
        self.chunks: set[Any] = set()  # autograd nodes
        self.calls: Counter[nn.Module] = Counter()  # of modules
        self.used: Counter[nn.Module] = Counter()  # of the operations that layers are
        self.layers: dict[Any, nn.Module] = {}  # autograd node → module
        self.constants: dict[Any, list[tuple[int, ...]]] = {}  # autograd node → shapes
        self.without_layer: set[Any] = set()  # norms that belong to no module
        self._running: list[nn.Module] = []
        self._norms = {
            id(tensor): module
            for module in model.modules()
            if isinstance(module, NORMS)
            for tensor in (*module._parameters.values(), *module._buffers.values())
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.whole.get(func, func)(*args, **(kwargs or {}))
        if func in _CHUNK:
            self.chunks.add(out[0].grad_fn)
        if not isinstance(out, Tensor) or out.grad_fn is None:
            return out
        if func in self.whole:
            self.names[out.grad_fn] = f"functional {func.__name__}"
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        kinds = _PRIMITIVES.get(func)
        if kinds is None:
            shapes = [tuple(side.shape) for side in tensors if not side.requires_grad and side.numel() > 1]
            if shapes:
                self.constants[out.grad_fn] = shapes
            return out
        layer = self._running[-1] if self._running and isinstance(self._running[-1], kinds) else None
        if layer is None and kinds is NORMS:
            layer = next((self._norms[id(tensor)] for tensor in tensors if id(tensor) in self._norms), None)
            if layer is None:
                self.without_layer.add(out.grad_fn)
        if layer is not None:
            self.used[layer] += 1
            self.layers[out.grad_fn] = layer
        return out

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Record the calls of modules."""

        def enter(module: nn.Module, _: Any) -> None:
            self._running.append(module)

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            self._running.pop()
            self.calls[module] += 1
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(module, LAYERS) and isinstance(output, Tensor) and not self.used[module]:
                self.layers[output.grad_fn] = module

        hooked = [m for m in self.model.modules() if isinstance(m, LAYERS) or not any(True for _ in m.children())]
        handles = [module.register_forward_pre_hook(enter) for module in hooked]
        handles += [module.register_forward_hook(leave) for module in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _trace(model: nn.Module, example: Tensor, whole: bool = True) -> Graph:
    recorder = _Recorder(model, whole)
    try:
        with torch.enable_grad(), FastShapes() if example.is_meta else nullcontext(), recorder, recorder.hooks():
            # With a gradient at the input, everything that depends on it has one, even if all parameters are frozen.
            # The multiplication gives the input itself a node in the graph.
            batch = example.detach().clone().requires_grad_() * 1.0
            result = model.eval()(batch)
            outputs = [tensor.grad_fn for tensor in tensors_in(result) if tensor.grad_fn is not None]
        if not tensors_in(result):
            raise ValueError(f"it returns {type(result).__name__}, in which no tensor was found; return tensors")
        if not outputs:
            raise ValueError("no gradient reaches its output from its parameters; is it wrapped in no_grad?")
    except Exception as error:  # It is the user's code and may raise anything.
        raise PlanError(f"the model fails on an input of shape {tuple(example.shape)}: {first_line(error)}") from error
    names = {module: name for name, module in model.named_modules()}
    start = batch.grad_fn
    nodes: dict[Any, Node] = {}
    for grad_fn in _topological(outputs):
        known = [(source, part) for source, part in _sources(grad_fn) if source in nodes]
        inputs, parts = [nodes[source] for source, _ in known], [part for _, part in known]
        parameters = [source for source, _ in _sources(grad_fn) if source not in nodes and not _is_scalar(source)]
        # What does not depend on the input, such as the reshaping of a weight, is left out.
        if inputs or grad_fn is start:
            module = recorder.layers.get(grad_fn)
            name = recorder.names.get(grad_fn) or grad_fn.name()
            op = "input" if grad_fn is start else _op(name, module, model, names)
            node = Node(len(nodes), names.get(module), op, module, grad_fn, _output_shape(grad_fn), inputs, parts)
            node.is_output = grad_fn in outputs
            node.mixes_parameter = module is None and (bool(parameters) or grad_fn in recorder.without_layer)
            node.constants = recorder.constants.get(grad_fn, [])
            node.is_chunk = grad_fn in recorder.chunks
            for source in {source.index: source for source in inputs}.values():
                source.outputs.append(node)
            nodes[grad_fn] = node
    reused = {
        names[m]
        for m, count in (recorder.calls | recorder.used).items()
        if count > 1 and any(True for _ in (*m.parameters(), *m.buffers()))
    }
    modules: dict[str, tuple[nn.Module, str, set[Any]]] = {}
    for node in nodes.values():
        if node.name and node.module is not None:
            modules.setdefault(node.name, (node.module, node.op, set()))[2].add(node.grad_fn)
    return Graph(list(nodes.values()), reused, used_elsewhere(outputs, modules, whole))


def _topological(outputs: list[Any]) -> list[Any]:
    """Return the autograd nodes that ``outputs`` depend on, inputs first."""
    ordered, seen = [], set()
    stack = [(grad_fn, False) for grad_fn in outputs]
    while stack:
        grad_fn, done = stack.pop()
        if done:
            ordered.append(grad_fn)
        elif grad_fn not in seen:
            seen.add(grad_fn)
            stack.append((grad_fn, True))
            stack += [(source, False) for source, _ in _sources(grad_fn)]
    return ordered


def _sources(grad_fn: Any) -> list[tuple[Any, int]]:
    """Return the autograd nodes that one reads, each with the number of the output that is read."""
    return list(dict.fromkeys((source, part) for source, part in grad_fn.next_functions if source is not None))


def _is_scalar(grad_fn: Any) -> bool:
    """Return whether this is, or computes, a single number, which acts on all channels equally."""
    shape = grad_fn.variable.shape if hasattr(grad_fn, "variable") else _output_shape(grad_fn)
    return shape is not None and math.prod(shape) == 1


def _op(name: str, module: nn.Module | None, model: nn.Module, names: dict[nn.Module, str]) -> str:
    if isinstance(module, CONVS):
        return "depthwise" if is_channelwise(model, names[module]) else "conv"
    kinds = {"transposed": TRANSPOSED, "linear": nn.Linear, "norm": NORMS, "prelu": nn.PReLU}
    return next((op for op, types in kinds.items() if isinstance(module, types)), name)


def _output_shape(grad_fn: Any) -> tuple[int, ...] | None:
    try:
        return tuple(int(side) for side in grad_fn._input_metadata[0].shape)
    except (AttributeError, IndexError, RuntimeError):
        return None
