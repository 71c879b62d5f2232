"""What computes what: a model's modules and operations as a graph in order of computation.

The tracing is torch-pruning's (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023), which follows
autograd from the output back to the input; so it sees functional operations as well as modules. Only its trace is
used: the grouping on top of it is in ``groups``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.errors import PlanError
from prunekit.layers import DepthwiseModules
from prunekit.pruning.graph.off_path import lock_off_path, used_elsewhere
from prunekit.utils.text import first_line

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

SUMS = ("AddBackward0", "SubBackward0")
PRODUCT = "MulBackward0"

# Operations through which a constant channel stays constant and adds up linearly, so that it can be moved to the norm
# behind.
LINEAR_OPS = ("AddBackward0", "UpsampleBilinear2DBackward0", "UpsampleNearest2DBackward0", "UpsampleBicubic2DBackward0")


@dataclass
class Node:
    """A module that was called, or an operation.

    Attributes:
        name: the module's name, or None for an operation.
        op: "conv", "depthwise", "transposed", "linear", "norm", "prelu", or the operation's autograd name such as
            "AddBackward0".
        shape: of the output, for modules that were seen, and ``in_shape`` of their input.
        is_output: what it computes is the model's output, or one of them.
        mixes_parameter: the operation combines a feature with a parameter that belongs to no known layer.
        mixes_tensor: it adds or multiplies with a tensor that does not depend on the input and has a value of its own
            for each channel.
        made: shape of what it puts out, where autograd says it.
        late: inputs that are computed after it, where it is a module that is called more than once.
    """

    index: int
    name: str | None
    op: str
    module: nn.Module | None
    grad_fn: Any
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    in_shape: tuple[int, ...] = ()
    is_output: bool = False
    mixes_parameter: bool = False
    mixes_tensor: bool = False
    made: tuple[int, ...] | None = None
    late: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Node({self.index}, {self.name or self.op})"

    @property
    def width(self) -> int | None:
        """Channels of the output, where they are known."""
        return self.made[1] if self.made and len(self.made) > 1 else None


@dataclass
class Graph:
    """Nodes in an order in which every node comes after its inputs.

    Attributes:
        reused: modules that are called more than once.
        aside: (module, node): a module that is not on the way to the output reads this node's channels.
        elsewhere: modules with a parameter that something else computes with.
    """

    nodes: list[Node]
    reused: set[str]
    aside: list[tuple[str, Node]] = field(default_factory=list)
    elsewhere: set[str] = field(default_factory=set)

    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes if node.name}


class _Tracer(tp.DependencyGraph):
    """torch-pruning's tracer without the dependency lists and index maps that it builds next (most of its time)."""

    def run(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], example: Any) -> list[Any]:
        self.model = model
        self.verbose = False
        self._module2name = {module: name for name, module in model.named_modules()}
        self.ignored_params = []
        self._param_to_name, self.unwrapped_parameters = self._detect_unwrapped_parameters(None)
        return list(self._trace(model, example, forward, None).values())


class _Tensors(TorchFunctionMode):
    """Notes the sums and products of which one side has no gradient and a value for each channel. To autograd a buffer
    looks like a number."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.grad_fn is not None and out.grad_fn.name() in (*SUMS, PRODUCT):
            for side in (*args, *(kwargs or {}).values()):
                if isinstance(side, Tensor) and not side.requires_grad:
                    axis = side.dim() - out.dim() + 1
                    if axis >= 0 and side.shape[axis] != 1:
                        self.mixed.add(out.grad_fn)
        return out


class _Nearest(TorchFunctionMode):
    """Up-samples by the nearest value, for tensors without numbers: the same shapes, and what is read from the graph
    holds for these kinds alike. (Theirs are worked out as those of norms are, see ``_weightless``.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("mode") in ("bilinear", "bicubic") and not kwargs.get("antialias"):
            kwargs = {**kwargs, "mode": "nearest", "align_corners": None}
        return func(*args, **kwargs)


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The graph of ``model`` on ``example`` (a batch of inputs). The model's mode, hooks and gradients are left as they
    were.

    Raises:
        PlanError: the model fails on the example.
    """
    _refuse(model, example)
    try:
        # Shapes are all that is asked for, so nothing is computed, unless the model wants to see numbers.
        copied, fed = _weightless(model), example.detach().to("meta")
        graph = _trace(copied, fed)
    except Exception:
        with _as_it_was(model):
            graph = _trace(model, example)
        try:
            copied, fed = copy.deepcopy(model), example
        except Exception:
            return graph
    known = graph.by_name()
    graph.aside = [(name, known[maker]) for name, maker in lock_off_path(copied, fed, set(known))]
    return graph


def _refuse(model: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor):
        raise PlanError(
            f"the example is a {type(example).__name__}; give one tensor, a batch (a model of several inputs: wrap it "
            "in a module that takes one)"
        )
    if example.dim() < 2 or not example.is_floating_point():
        raise PlanError(f"the example is {tuple(example.shape)} of {example.dtype}; give a batch (N, C, …) of floats")
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise PlanError("the model has lazy modules that have seen no input yet; run it once first")


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Takes back what forward writes to buffers and attributes: counters, cached grids."""
    held = [
        (module, dict(vars(module)), {k: b.clone() for k, b in module._buffers.items() if b is not None})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attributes, buffers in held:
                vars(module).clear()
                vars(module).update(attributes)
                for name, value in buffers.items():
                    module._buffers[name].copy_(value)


def _weightless(model: nn.Module) -> nn.Module:
    """A copy on the meta device: the same modules, without a number in them; its norms and PReLUs hand on what they
    get, since PyTorch works out their shapes operation by operation, which takes longer than all the rest."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                empty = torch.empty_like(tensor, device="meta")
                trained = name in module._parameters
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if type(module) in (*NORMS, nn.PReLU):
            module.forward = torch.clone
    return copied


def _trace(model: nn.Module, example: Tensor) -> Graph:
    calls: dict[nn.Module, int] = {}
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    in_shapes: dict[nn.Module, tuple[int, ...]] = {}

    def seen(module: nn.Module, given: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            shapes[module] = tuple(output.shape)
        if given and isinstance(given[0], Tensor):
            in_shapes[module] = tuple(given[0].shape)

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    hooks = [leaf.register_forward_hook(seen) for leaf in leaves]
    modes = {module: module.training for module in model.modules()}
    before = {module: set(module._forward_hooks) for module in model.modules()}
    tensors = _Tensors()
    start: list[Any] = []
    ends: set[Any] = set()

    def forward(model: nn.Module, example: Tensor) -> Any:
        # With a gradient at the input, everything that depends on it has one, frozen parameters or not; and the
        # multiplication gives the input itself a place in the graph.
        fed = example.detach().clone().requires_grad_() * 1.0
        start.append(fed.grad_fn)
        with tensors, _Nearest() if example.is_meta else nullcontext():
            found = [tensor for tensor in tensors_in(model(fed)) if tensor.grad_fn is not None]
        if not found:
            raise ValueError("no gradient reaches its output from its parameters; is it wrapped in no_grad?")
        ends.update(tensor.grad_fn for tensor in found)
        return found

    try:
        with torch.enable_grad():
            traced = _Tracer().run(model, forward, example)
    except Exception as error:  # It is the user's code, and fails in any way.
        raise PlanError(f"the model fails on an input of shape {tuple(example.shape)}: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, kept in before.items():
            # Where the model fails, the tracer leaves its own behind.
            for key in set(module._forward_hooks) - kept:
                del module._forward_hooks[key]
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in model.named_modules()}
    depthwise = {
        m for container in model.modules() if isinstance(container, DepthwiseModules) for m in container.values()
    }
    nodes = {
        id(raw): Node(
            i,
            names.get(raw.module),
            _op(raw, depthwise),
            _module(raw),
            raw.grad_fn,
            shape=shapes.get(raw.module, ()),
            in_shape=in_shapes.get(raw.module, ()),
        )
        for i, raw in enumerate(traced)
    }
    for raw in traced:
        nodes[id(raw)].is_output = raw.grad_fn in ends
        nodes[id(raw)].mixes_tensor = raw.grad_fn in tensors.mixed
        nodes[id(raw)].made = _made(raw.grad_fn)
        nodes[id(raw)].inputs = [nodes[id(n)] for n in raw.inputs]
        nodes[id(raw)].outputs = [nodes[id(n)] for n in raw.outputs]
    reused = {names[m] for m, count in calls.items() if count > 1 and any(True for _ in m.parameters())}
    named = {node.name: (node.module, node.op, node.grad_fn) for node in nodes.values() if node.name and node.module}
    ordered = _from_input(_sort(list(nodes.values()), reused), start[-1])
    return Graph(ordered, reused, elsewhere=used_elsewhere(ends, named))


def follow(node: Node, ops: tuple[str, ...]) -> Node | None:
    """What comes after ``node`` and a chain of these operations; None where the chain branches, or weighs what it
    adds."""
    while len(node.outputs) == 1 and not node.is_output and getattr(node.grad_fn, "_saved_alpha", 1) == 1:
        node = node.outputs[0]
        if node.op not in ops:
            return node
    return None


def _from_input(ordered: list[Node], start: Any) -> list[Node]:
    """Leave out what does not depend on the input: how a parameter is reshaped before it is used, say."""
    live: set[int] = set()
    for node in ordered:
        if node.grad_fn is start:
            node.op = "input"
        if node.op == "input" or any(n.index in live for n in node.inputs):
            live.add(node.index)
    for node in ordered:
        inputs = [n for n in node.inputs if n.index in live]
        node.mixes_parameter = node.name is None and len(inputs) < len(node.inputs)
        node.inputs = inputs
    return [node for node in ordered if node.index in live]


def _module(raw: Any) -> nn.Module | None:
    return raw.module if isinstance(raw.module, nn.Module) and not type(raw.module).__name__.startswith("_") else None


def _op(raw: Any, depthwise: set[nn.Module]) -> str:
    module = raw.module
    if isinstance(module, CONVS):
        alone = module.groups == module.in_channels == module.out_channels
        return "depthwise" if module in depthwise or (alone and module.groups > 1) else "conv"
    if isinstance(module, TRANSPOSED):
        return "transposed"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, nn.PReLU):
        return "prelu"
    return raw.grad_fn.name() if hasattr(raw.grad_fn, "name") else "unknown"


def _sort(nodes: list[Node], reused: set[str]) -> list[Node]:
    """Inputs first. The tracer has one node for a module however often it is called, so there may be a circle through
    it; it is cut there."""
    waiting = {node.index: len(node.inputs) for node in nodes}
    ready = [node for node in nodes if not node.inputs]
    placed: set[int] = set()
    ordered = []
    while len(ordered) < len(nodes):
        if not ready:
            stuck = [n for n in nodes if n.index not in placed and n.name in reused]
            if not stuck:
                raise PlanError("the model computes in a circle, which cannot be traced")
            node = next((n for n in stuck if any(i.index in placed for i in n.inputs)), stuck[0])
            node.late = [n for n in node.inputs if n.index not in placed]
            node.inputs = [n for n in node.inputs if n.index in placed]
            ready.append(node)
        node = ready.pop()
        if node.index in placed:
            continue
        placed.add(node.index)
        ordered.append(node)
        for out in node.outputs:
            waiting[out.index] -= 1
            if waiting[out.index] == 0:
                ready.append(out)
    return ordered


def _made(grad_fn: Any) -> tuple[int, ...] | None:
    """The shape of what this operation puts out (first); None where autograd does not say."""
    try:
        return tuple(int(side) for side in grad_fn._input_metadata[0].shape)
    except (AttributeError, IndexError, RuntimeError):
        return None


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of a model's output: one, or lists, tuples and dicts of them, nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in tensors_in(part)] if isinstance(output, list | tuple) else []
