"""How gates combine along the way of a channel.

A *life* says which gates can end a channel. It is a tree over norms: gates in a row (``serial``), any of which ends
it when it is zero; and side by side (``parallel``), all of which must be. A channel that no gate can end is ``ALIVE``.

The score of a channel says how much of it is left, in units that can be compared between layers: the *effective gate*
of the last norm of a row, |γ|·√(v/(v+ε)) with v the running variance, since the next norm rescales whatever the gates
before it shrink; zero if any gate of the row is zero. The score of a sum is the largest of its sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from prunekit.pruning.plan import Gate, Group

GateExpr = tuple  # ("alive",) | ("gate", norm, offset) | ("serial", Life, …) | ("parallel", Life, …)

ALIVE: GateExpr = ("alive",)


def append_gate(past: GateExpr, norm: str, offset: int) -> GateExpr:
    """The life of channels that have passed one more norm, standing in it from ``offset`` on."""
    gate = ("gate", norm, offset)
    if past == ALIVE:
        return gate
    return (*past, gate) if past[0] == "serial" else ("serial", past, gate)


def parallel(lives: list[GateExpr]) -> GateExpr:
    """The life of a sum, or of channels that several readers see differently: over only when all are."""
    sides: dict[GateExpr, None] = {}
    for one in lives:
        sides.update(dict.fromkeys(one[1:] if one[0] == "parallel" else (one,)))
    if ALIVE in sides:
        return ALIVE
    sides = dict.fromkeys(_shorter(one, sides) for one in sides)
    return next(iter(sides)) if len(sides) == 1 else ("parallel", *sides)


def _shorter(one: GateExpr, sides: dict[GateExpr, None]) -> GateExpr:
    """A row that begins with a sum of nothing but sides beside it, as in x + f(x), is over with them, whichever of them
    it remembers; without this a tower of such sums doubles the tree at each floor."""
    if one[0] == "serial" and one[1][0] == "parallel" and all(side in sides for side in one[1][1:]):
        return ("serial", one[1][1], *one[2:])
    return one


def product(a: GateExpr, b: GateExpr) -> GateExpr:
    """The life of a product: over when either side is. A side that no gate can end does not save the other."""
    if ALIVE in (a, b):
        return b if a == ALIVE else a
    return a if a == b else ("serial", a, b)


def shift(one: GateExpr, by: int) -> GateExpr:
    """The same life for channels that begin ``by`` further on."""
    if by == 0 or one == ALIVE:
        return one
    if one[0] == "gate":
        return ("gate", one[1], one[2] + by)
    return (one[0], *(shift(part, by) for part in one[1:]))


def resolve(one: GateExpr, channels: int) -> tuple[list[Gate], Any]:
    """The gates of a life and the tree over their indices, as a Group holds them; ([], None) where it is ALIVE."""
    gates: dict[tuple[str, int], int] = {}

    def walk(part: GateExpr) -> Any:
        if part[0] == "gate":
            return gates.setdefault((part[1], part[2]), len(gates))
        return {part[0]: [walk(p) for p in part[1:]]}

    if one == ALIVE:
        return [], None
    tree = walk(one)
    return [Gate(norm=norm, slice=(start, start + channels)) for norm, start in gates], tree


def effective_gates(norm: nn.Module) -> np.ndarray:
    """|γ|·√(v/(v+ε)) of each channel of a BatchNorm, (C,) float64: the deviation of its output over the data."""
    gamma = norm.weight.detach().double().abs()
    if norm.running_var is None:
        return gamma.cpu().numpy()
    variance = norm.running_var.detach().double()
    return (gamma * (variance / (variance + norm.eps)).sqrt()).cpu().numpy()


def gate_scores(model: nn.Module, group: Group) -> np.ndarray:
    """How much of each channel of the group is left, (channels,) float64; 0 is dead, ∞ where no gate decides."""
    if group.combine is None:
        return np.full(group.channels, np.inf)
    norms = [model.get_submodule(gate.norm) for gate in group.gates]
    cut = [slice(*gate.slice) for gate in group.gates]
    effective = [effective_gates(norm)[part] for norm, part in zip(norms, cut, strict=True)]
    dead = [(norm.weight.detach() == 0).cpu().numpy()[part] for norm, part in zip(norms, cut, strict=True)]

    def walk(part: Any) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(part, int):
            return effective[part], dead[part]
        kind, parts = next(iter(part.items()))
        values, ends = zip(*map(walk, parts), strict=True)
        if kind == "serial":
            over = np.logical_or.reduce(ends)
            return np.where(over, 0.0, values[-1]), over
        over = np.logical_and.reduce(ends)
        return np.maximum.reduce(values), over

    values, over = walk(group.combine)
    return np.where(over, 0.0, values)


def zeroing_masks(model: nn.Module, group: Group, dead: Iterable[int]) -> list[np.ndarray]:
    """For each gate of the group, which of its channels must be set to zero for the dead ones to be dead.

    A row in which a gate is zero is closed already, and its other gates are left as they are; else the last one is
    closed.

    Returns:
        a mask (channels,) for each of ``group.gates``.
    """
    wanted = np.zeros(group.channels, bool)
    wanted[list(dead)] = True
    zero = [
        (model.get_submodule(gate.norm).weight.detach() == 0).cpu().numpy()[slice(*gate.slice)] for gate in group.gates
    ]
    masks = [np.zeros(group.channels, bool) for _ in group.gates]

    def over(part: Any) -> np.ndarray:
        if isinstance(part, int):
            return zero[part]
        kind, parts = next(iter(part.items()))
        return (np.logical_or if kind == "serial" else np.logical_and).reduce([over(p) for p in parts])

    def close(part: Any, need: np.ndarray) -> None:
        if isinstance(part, int):
            masks[part] |= need
            return
        kind, parts = next(iter(part.items()))
        need = need & ~over(part)
        for p in parts[-1:] if kind == "serial" else parts:
            close(p, need)

    if group.combine is not None:
        close(group.combine, wanted)
    return masks


def last_gates(group: Group) -> list[int]:
    """The gates of the group, as indices into ``group.gates``, behind which no other stands in its row: nothing norms
    again what they let through."""

    def walk(part: Any) -> list[int]:
        if isinstance(part, int):
            return [part]
        kind, parts = next(iter(part.items()))
        return [index for p in (parts[-1:] if kind == "serial" else parts) for index in walk(p)]

    return [] if group.combine is None else sorted(set(walk(group.combine)))
