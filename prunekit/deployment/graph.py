"""A model's inference as a graph that passes may rewrite.

The trace is torch.fx's. Every call of a module has a module of its own in it, so that a pass may give one call new
weights without touching another's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.errors import ExportError
from prunekit.layers.octave_trace import Shapes
from prunekit.utils.text import first_line

ADDS = {torch.add, torch.Tensor.add, "add"}
POOLS = {F.max_pool2d, F.avg_pool2d}
# What computes the same when it is called twice, and nothing else.
PURE = {*POOLS, F.interpolate}


class Graph:
    """A rewritable copy of a model in eval mode, in float32 on the CPU.

    Args:
        model: is left as it is.
        example: a batch of what it takes; its first is looked at.

    Attributes:
        module: what the graph computes, callable as the model is.
        shapes: of each node's value on the example.
        output: the node whose value is the model's; None where that is no single tensor.

    Raises:
        ExportError: torch.fx cannot follow the model, or what it follows computes something else.
    """

    def __init__(self, model: nn.Module, example: Tensor):
        root = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self.example = example[:1].detach().cpu().float()
        try:
            self.module = fx.symbolic_trace(root)
        except Exception as error:  # It is the user's code, and fails in any way.
            raise ExportError(f"torch.fx cannot follow the model: {first_line(error)}") from error
        for node in self.nodes:
            # Annotations as text, which a graph with them cannot be pickled for.
            node.type = None
        self._own_modules()
        self._simplify()
        try:
            with torch.inference_mode():
                same = _same(self._run(), root(self.example))
        except Exception as error:
            raise ExportError(f"what torch.fx follows is not what the model computes: {first_line(error)}") from error
        if not same:
            raise ExportError("what torch.fx follows is not what the model computes: its outputs differ")

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def _run(self) -> Any:
        """What the graph makes of the example; each value's shape is noted."""
        run = Shapes(self.module)
        made = run.run(self.example)
        self.shapes = run.shapes
        return made

    @property
    def output(self) -> fx.Node | None:
        value = next(node.args[0] for node in self.nodes if node.op == "output")
        return value if isinstance(value, fx.Node) else None

    def finish(self) -> nn.Module:
        """The module, with what nothing reads any more taken out."""
        self.module.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def called(self, node: Any, *kinds: type[nn.Module]) -> nn.Module | None:
        """The module that this node calls, where it is of just one of these classes; of a subclass nothing is known."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = self.module.get_submodule(node.target)
        return module if type(module) in kinds else None

    def conv(self, node: Any) -> nn.Conv2d | None:
        """The convolution that this node calls; None for any other node, or where borders are no zeros."""
        module = self.called(node, nn.Conv2d)
        return module if module is not None and module.padding_mode == "zeros" else None

    def is_add(self, node: Any) -> bool:
        """Whether the node is the sum of two values of one shape."""
        return (
            isinstance(node, fx.Node)
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

    def is_whole_sum(self, node: Any) -> bool:
        """Whether the node is a sum, and no part of a larger one alone."""
        return self.is_add(node) and not (len(node.users) == 1 and self.is_add(next(iter(node.users))))

    def terms(self, total: fx.Node) -> list[fx.Node]:
        """What a sum adds up, sums in it taken apart where nothing else reads them."""
        parts = []
        for side in total.args:
            inner = self.is_add(side) and len(side.users) == 1
            parts += self.terms(side) if inner else [side]
        return parts

    def is_call(self, node: Any, functions: Iterable[Callable[..., Any]]) -> bool:
        """Whether the node calls one of these functions."""
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions

    def insert(self, before: fx.Node, module: nn.Module, args: tuple[Any, ...], name: str) -> fx.Node:
        """A call of a new module, before this node."""
        target = name.replace(".", "_")
        while hasattr(self.module, target):
            target += "_"
        self.module.add_submodule(target, module.eval().requires_grad_(False))
        with self.module.graph.inserting_before(before):
            return self.module.graph.call_module(target, args)

    def drop(self, node: fx.Node, instead: fx.Node) -> None:
        """Take a node out; those that read it read another."""
        node.replace_all_uses_with(instead)
        self.module.graph.erase_node(node)

    def _own_modules(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            if node.op != "call_module":
                continue
            if node.target in seen:
                module = copy.deepcopy(self.module.get_submodule(node.target))
                with self.module.graph.inserting_before(node):
                    twin = self.insert(node, module, node.args, f"{node.target}_again")
                twin.kwargs = node.kwargs
                self.drop(node, twin)
            else:
                seen.add(node.target)

    def _simplify(self) -> None:
        """What does nothing in eval mode goes."""
        nothing = (nn.Identity, nn.Dropout, nn.Dropout2d)
        for node in self.nodes:
            if self.called(node, *nothing) is not None and len(node.args) == 1:
                self.drop(node, node.args[0])
            elif self.called(node, nn.ReLU) is not None:
                # As a function it can be told from its input alone.
                with self.module.graph.inserting_before(node):
                    twin = self.module.graph.call_function(F.relu, node.args)
                self.drop(node, twin)
        self.finish()


def _same(made: Any, wanted: Any) -> bool:
    """Whether two outputs are equal but for rounding; torch.testing would bring 50 MB of imports into processes whose
    memory is measured."""
    if isinstance(wanted, Tensor):
        alike = isinstance(made, Tensor) and made.shape == wanted.shape and made.dtype == wanted.dtype
        return alike and torch.allclose(made, wanted, rtol=1.3e-6, atol=1e-5, equal_nan=True)
    if isinstance(wanted, dict):
        return made.keys() == wanted.keys() and all(_same(made[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(made) == len(wanted) and all(map(_same, made, wanted))
    return made == wanted


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each channel goes alone through the convolution."""
    return conv.groups == conv.in_channels == conv.out_channels > 1


@dataclass(frozen=True)
class Pooling:
    """A pooling without padding; kernel and stride as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    ceil: bool


def pooling(node: fx.Node) -> Pooling | None:
    """What a node of ``POOLS`` does; None where it pads or does more."""
    given = {**dict(zip(("x", "kernel_size", "stride"), node.args, strict=False)), **node.kwargs}
    plain = {"padding": 0, "dilation": 1, "return_indices": False, "count_include_pad": True, "divisor_override": None}
    if len(node.args) > 3 or any(given.get(key, right) != right for key, right in plain.items()):
        return None
    kernel = given["kernel_size"]
    stride = kernel if given.get("stride") is None else given["stride"]
    kernel, stride = (side if isinstance(side, tuple) else (side, side) for side in (kernel, stride))
    return Pooling(kernel, stride, bool(given.get("ceil_mode", False)))
