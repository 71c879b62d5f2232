"""Gate expressions: which gates make a channel zero, and the score of a channel.

A gate expression is a tree over gates. ``serial``: the channel passes one gate after another and is dead when any of
them is zero. ``parallel``: several channels are added, or several readers see different gates; the channel is dead
only when all of them are zero. A channel that passes no gate is ``UNGATED``.

The score of a serial expression is the effective gate |γ|·√(v/(v+ε)) of its last norm (v: the running variance),
because the next norm rescales what earlier gates shrink; it is 0 if any gate is zero. The score of a parallel
expression is the largest of its parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import nn

from prunekit.pruning.graph.silence import Rows, silencing_rows, silent_channels
from prunekit.pruning.plan import Gate, Group, Span

T = TypeVar("T")


class GateExpr(tuple):
    """("ungated",), ("gate", norm, offset), ("serial", GateExpr, …) or ("parallel", GateExpr, …).

    Equal expressions are one object, so that what parallel branches have in common is stored and visited once.
    """

    _known: ClassVar[dict[GateExpr, GateExpr]] = {}

    def __new__(cls, *parts: Any) -> GateExpr:
        expr = super().__new__(cls, parts)
        expr.hash = hash(parts)
        return cls._known.setdefault(expr, expr)

    def __hash__(self) -> int:
        return self.hash


UNGATED = GateExpr("ungated")


def clear_expressions() -> None:
    """Release the expressions of earlier models."""
    GateExpr._known.clear()
    GateExpr._known[UNGATED] = UNGATED


def append_gate(expr: GateExpr, norm: str, offset: int) -> GateExpr:
    """Return the expression of channels that pass one more norm, in which they start at ``offset``."""
    gate = GateExpr("gate", norm, offset)
    if expr == UNGATED:
        return gate
    return GateExpr(*expr, gate) if expr[0] == "serial" else GateExpr("serial", expr, gate)


def parallel(exprs: Iterable[GateExpr]) -> GateExpr:
    """Return the expression of a sum, or of channels that several readers see through different gates."""
    parts: dict[GateExpr, None] = {}
    for expr in exprs:
        parts.update(dict.fromkeys(expr[1:] if expr[0] == "parallel" else (expr,)))
    if UNGATED in parts:
        return UNGATED
    parts = dict.fromkeys(_absorb(part, parts) for part in parts)
    return next(iter(parts)) if len(parts) == 1 else GateExpr("parallel", *parts)


def _absorb(expr: GateExpr, siblings: dict[GateExpr, None]) -> GateExpr:
    """Shorten the residual branch in x + f(x): where all terms of x are siblings, one of them represents x.

    The branch is then dead in the same cases. Without this, the tree doubles with each residual block.
    """
    if expr[0] == "serial" and expr[1][0] == "parallel" and all(part in siblings for part in expr[1][1:]):
        return GateExpr("serial", expr[1][1], *expr[2:])
    return expr


def serial(a: GateExpr, b: GateExpr) -> GateExpr:
    """Return the expression of a product, which is zero when either factor is."""
    if UNGATED in (a, b):
        return b if a == UNGATED else a
    return a if a == b else GateExpr("serial", a, b)


def resolve(expr: GateExpr, channels: int) -> tuple[list[Gate], Any]:
    """Return the gates of an expression and its tree of gate indices, as in ``Group``; ([], None) for ``UNGATED``."""
    gates: dict[tuple[str, int], int] = {}

    @cache
    def to_tree(part: GateExpr) -> Any:
        if part[0] == "gate":
            return gates.setdefault((part[1], part[2]), len(gates))
        return {part[0]: [to_tree(p) for p in part[1:]]}

    if expr == UNGATED:
        return [], None
    tree = to_tree(expr)
    return [Gate(norm=norm, slice=(start, start + channels)) for norm, start in gates], tree


def _fold(
    tree: Any, leaf: Callable[[int], T], combine: Callable[[str, list[T]], T], known: dict[int, T] | None = None
) -> T:
    """Evaluate the tree of a group bottom-up, parts that it shares once.

    ``combine`` gets "serial" or "parallel" and the values of the parts; ``known`` gets each value by its part's id.
    """
    if isinstance(tree, int):
        return leaf(tree)
    known = {} if known is None else known
    if id(tree) not in known:
        ((kind, parts),) = tree.items()
        known[id(tree)] = combine(kind, [_fold(part, leaf, combine, known) for part in parts])
    return known[id(tree)]


def effective_gates(norm: nn.Module) -> np.ndarray:
    """Return |γ|·√(v/(v+ε)) of a BatchNorm, (C,) float64: the standard deviation of its output over the data."""
    gamma = norm.weight.detach().double().abs()
    if norm.running_var is None:
        return gamma.cpu().numpy()
    variance = norm.running_var.detach().double()
    return (gamma * (variance / (variance + norm.eps)).sqrt()).cpu().numpy()


def _zero_gates(model: nn.Module, group: Group) -> list[np.ndarray]:
    return [(model.get_submodule(g.norm).weight.detach() == 0).cpu().numpy()[slice(*g.slice)] for g in group.gates]


def gate_scores(model: nn.Module, group: Group) -> np.ndarray:
    """Return the score of each channel of a group, (channels,) float64: 0 is dead; ∞ is alive and passes no gate."""
    if group.combine is None:
        return np.where(silent_channels(model, group), 0.0, np.inf)
    effective = [effective_gates(model.get_submodule(gate.norm))[slice(*gate.slice)] for gate in group.gates]
    leaves = list(zip(effective, _zero_gates(model, group), strict=True))

    def combine(kind: str, parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        scores, dead = zip(*parts, strict=True)
        if kind == "parallel":
            return np.maximum.reduce(scores), np.logical_and.reduce(dead)
        any_dead = np.logical_or.reduce(dead)
        return np.where(any_dead, 0.0, scores[-1]), any_dead

    return _fold(group.combine, leaves.__getitem__, combine)[0]


def zeroing_masks(model: nn.Module, group: Group, dead: Iterable[int]) -> list[np.ndarray]:
    """Return a mask (channels,) for each gate of a group: which γ to set to zero so that the given channels are dead.

    In a serial expression only the last gate is set, and none where one is zero already.
    """
    wanted = np.zeros(group.channels, bool)
    wanted[list(dead)] = True
    zero = _zero_gates(model, group)
    masks = [np.zeros(group.channels, bool) for _ in group.gates]

    def is_dead(kind: str, parts: list[np.ndarray]) -> np.ndarray:
        return (np.logical_or if kind == "serial" else np.logical_and).reduce(parts)

    if group.combine is None:
        return masks
    dead_parts: dict[int, np.ndarray] = {}
    _fold(group.combine, zero.__getitem__, is_dead, dead_parts)
    wanted_of: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(group.channels, bool))
    wanted_of[id(group.combine)] = wanted
    for tree in reversed(_inner_parts(group.combine)):
        ((kind, parts),) = tree.items()
        channels = wanted_of[id(tree)] & ~dead_parts[id(tree)]
        for part in parts[-1:] if kind == "serial" else parts:
            if isinstance(part, int):
                masks[part] |= channels
            else:
                wanted_of[id(part)] |= channels
    if isinstance(group.combine, int):
        masks[group.combine] |= wanted
    return masks


def _inner_parts(tree: Any) -> list[Any]:
    """List the parts of a tree that have parts themselves, each once, after its own parts."""
    found: dict[int, Any] = {}

    def visit(part: Any) -> None:
        if not isinstance(part, int) and id(part) not in found:
            for below in next(iter(part.values())):
                visit(below)
            found[id(part)] = part

    visit(tree)
    return list(found.values())


def last_gates(group: Group) -> list[int]:
    """Return the indices into ``group.gates`` of the gates that no later gate of the expression follows."""

    def last(kind: str, parts: list[set[int]]) -> set[int]:
        return parts[-1] if kind == "serial" else set().union(*parts)

    return [] if group.combine is None else sorted(_fold(group.combine, lambda index: {index}, last))


def shrinking_rows(model: nn.Module, group: Group) -> Iterator[Rows]:
    """Yield what shrinks with a channel: the weight and bias of its last norms; without gates, what it is made by."""
    if group.combine is None:
        yield from silencing_rows(model, group)
    for gate in (group.gates[number] for number in last_gates(group)):
        module = model.get_submodule(gate.norm)
        for name, parameter in (("weight", module.weight), ("bias", module.bias)):
            if parameter is not None:
                yield Rows(f"{gate.norm}.{name}", parameter, Span(axis=0, offset=gate.slice[0]))
