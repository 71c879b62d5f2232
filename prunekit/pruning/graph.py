"""What computes what: a model's modules and operations as a graph in order of computation.

The tracing is torch-pruning's (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023), which follows
autograd from the output back to the input; so it sees functional operations as well as modules. Only its trace is
used: the grouping on top of it is in ``groups``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.layers import DepthwiseModules

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Operations through which a constant channel stays constant and adds up linearly, so that it can be moved to the norm
# behind.
LINEAR_OPS = ("AddBackward0", "UpsampleBilinear2DBackward0", "UpsampleNearest2DBackward0", "UpsampleBicubic2DBackward0")


@dataclass
class Node:
    """A module that was called, or an operation.

    Attributes:
        name: the module's name, or None for an operation.
        op: "conv", "depthwise", "linear", "norm", "prelu", or the operation's autograd name such as "AddBackward0".
        shape: of the output, for modules that were seen.
        is_output: what it computes is the model's output, or one of them.
        mixes_parameter: the operation combines a feature with a parameter that belongs to no known layer.
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
    is_output: bool = False
    mixes_parameter: bool = False
    late: list[Node] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Node({self.index}, {self.name or self.op})"


@dataclass
class Graph:
    """Nodes in an order in which every node comes after its inputs."""

    nodes: list[Node]
    reused: set[str]

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


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The graph of ``model`` on ``example`` (a batch of inputs). The model's mode and gradients are left as they were.

    Raises:
        PlanError: the model fails on the example.
    """
    calls: dict[nn.Module, int] = {}
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def seen(module: nn.Module, _: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            shapes[module] = tuple(output.shape)

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    hooks = [leaf.register_forward_hook(seen) for leaf in leaves]
    modes = {module: module.training for module in model.modules()}
    start: list[Any] = []
    ends: set[Any] = set()

    def forward(model: nn.Module, example: Tensor) -> Any:
        # With a gradient at the input, everything that depends on it has one, frozen parameters or not; and the
        # multiplication gives the input itself a place in the graph.
        fed = example.detach().clone().requires_grad_() * 1.0
        start.append(fed.grad_fn)
        out = model(fed)
        ends.update(tensor.grad_fn for tensor in tp.utils.flatten_as_list(out) if isinstance(tensor, Tensor))
        return out

    try:
        with torch.enable_grad():
            traced = _Tracer().run(model, forward, example)
    except (RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"the model fails on an input of shape {tuple(example.shape)}: {_first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    names = {module: name for name, module in model.named_modules()}
    depthwise = {
        m for container in model.modules() if isinstance(container, DepthwiseModules) for m in container.values()
    }
    nodes = {
        id(raw): Node(
            i, names.get(raw.module), _op(raw, depthwise), _module(raw), raw.grad_fn, shape=shapes.get(raw.module, ())
        )
        for i, raw in enumerate(traced)
    }
    for raw in traced:
        nodes[id(raw)].is_output = raw.grad_fn in ends
        nodes[id(raw)].inputs = [nodes[id(n)] for n in raw.inputs]
        nodes[id(raw)].outputs = [nodes[id(n)] for n in raw.outputs]
    reused = {names[m] for m, count in calls.items() if count > 1 and any(True for _ in m.parameters())}
    return Graph(_from_input(_sort(list(nodes.values()), reused), start[-1]), reused)


def follow(node: Node, ops: tuple[str, ...]) -> Node | None:
    """What comes after ``node`` and a chain of these operations; None where the chain branches."""
    while len(node.outputs) == 1:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
