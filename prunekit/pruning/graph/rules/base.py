"""The registry of rules, and what a rule can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from prunekit.pruning.graph import axis_terms
from prunekit.pruning.graph.axis_terms import Fixed, Leaf, Term, resolve
from prunekit.pruning.graph.recorder import Op, Value

# From an operation, whose inputs have axes, to the axes of its outputs; None where it cannot be followed.
Rule = Callable[[Op, "AxisGraph"], Sequence[Sequence[Term]] | None]
RULES: dict[str, Rule] = {}
CONSTANT = "combined with a tensor that is not a parameter and differs between channels"
SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
F = TypeVar("F", bound=Rule)
# Elementwise operations that PyTorch does not mark as such.
UNMARKED = {
    "threshold",
    "hardswish",
    "hardshrink",
    "softshrink",
    "log_sigmoid",
    "rrelu_with_noise",
    "lerp",
    "where",
    "copy",
    "masked_fill",
}
UNMARKED |= {"rsub", "clamp"}


def register_rule(*names: str) -> Callable[[F], F]:
    """Register a function as the rule of operations.

    A rule gets a call of the operation, whose tensors are values with axes, and the graph, by which it identifies axes
    (``unify``) or makes channels unprunable (``lock``). It returns the axes of each output, or None where it does not
    know the call.

    Args:
        names: in ATen without the namespace, such as ``"roll"``; of other operators with it: ``"mylib::scaled_tanh"``.
    """

    def register(function: F) -> F:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find_rule(name: str, func: Any) -> Rule | None:
    """Return the rule of an operation. One that works in place has that of its out-of-place form."""
    found = RULES.get(name) or (RULES.get(name[:-1]) if name.endswith("_") else None)
    return RULES["pointwise"] if found is None and is_elementwise(name, func) else found


@cache
def is_elementwise(name: str, func: Any) -> bool:
    """Return whether an operation works on each entry alone, or on entries at the same position."""
    if func is None:
        return False
    # Some are marked in their out-of-place form only.
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    forms = [func, *(getattr(packet, overload) for overload in (packet.overloads() if packet else ()))]
    return name.removesuffix("_") in UNMARKED or any(torch.Tag.pointwise in form.tags for form in forms)


@dataclass
class Read:
    """An axis of a parameter that an operation contracts with an axis of another tensor."""

    op: Op
    tensor: Value
    axis: int
    value: Value
    value_axis: int


@dataclass
class Statistic:
    """An operation that computes a statistic over an axis of its input, such as the mean of a norm."""

    op: Op
    axis: int  # of its first input
    term: Term


@dataclass
class AxisGraph:
    """What rules find out besides the axes of outputs."""

    model: nn.Module
    reads: list[Read] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    # Axes of values that something other than a layer reads: of each list, the pruned entries of one must be zero.
    zeroed: list[tuple[Op, list[tuple[Value, int]]]] = field(default_factory=list)
    virtual: dict[tuple[str, int], Term] = field(default_factory=dict)  # input axes of grouped convolutions, in all
    counts: list[tuple[str, Term]] = field(default_factory=list)  # attributes that are lengths of axes
    on_path: set[Op] = field(default_factory=set)  # the operations that an output depends on
    off_path: set[Op] = field(default_factory=set)  # those of which at most the shape of the result matters

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())

    def unify(self, op: Op, a: Term, b: Term) -> None:
        axis_terms.unify(a, b, self.label(op))

    def lock(self, op: Op, terms: Iterable[Term], what: str = "which is not supported") -> None:
        for term in terms if op not in self.off_path else ():
            axis_terms.lock(term, f"passes {self.label(op)}, {what}")

    def read(self, op: Op, tensor: Value, axis: int, value: Value, value_axis: int) -> None:
        self.reads.append(Read(op, tensor, axis, value, value_axis))

    def statistic(self, op: Op, value: Value, axis: int) -> None:
        if not isinstance(resolve(value.axes[axis]), Fixed):
            self.statistics.append(Statistic(op, axis, value.axes[axis]))

    def label(self, op: Op) -> str:
        """A layer's name and class, or an operation's name and line."""
        module = self.modules[op.module]
        if op.module and type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children()):
            return f"{op.module} ({type(module).__name__})"
        return f"{op.name} ({op.line})"


def fixed(shape: Iterable[int]) -> list[Term]:
    return [Fixed(side) for side in shape]


def locked(shape: Iterable[int], reason: str) -> list[Term]:
    return [Leaf(side, reason) if side > 1 else Fixed(side) for side in shape]


def new_leaves(shape: Iterable[int]) -> list[Term]:
    return [Leaf(side) if side > 1 else Fixed(side) for side in shape]


def broadcast(op: Op, graph: AxisGraph, values: Sequence[Value], rank: int) -> list[Term]:
    """Identify the axes of tensors whose shapes are aligned at their ends; return those of the result."""
    axes: list[Term] = [Fixed(1)] * rank
    for value in values:
        for axis, term in enumerate(value.axes, rank - len(value.axes)):
            if axis < 0:
                continue
            if axes[axis].size == 1 == term.size:
                if isinstance(resolve(axes[axis]), Fixed):
                    axes[axis] = term
                elif isinstance(resolve(term), Leaf):
                    graph.unify(op, axes[axis], term)
            elif 1 in (term.size, axes[axis].size):
                single, axes[axis] = (term, axes[axis]) if term.size == 1 else (axes[axis], term)
                axis_terms.lock(single, "combined with all channels of another tensor")
            else:
                graph.unify(op, axes[axis], term)
    return axes
