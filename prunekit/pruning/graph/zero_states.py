"""What becomes of a channel that is zero: by which gates it is made zero, and whether it stays zero.

Runs after propagation, when the terms of all axes are known. The states of an axis are aligned with its spans.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from prunekit.pruning.graph.axis_terms import Leaf, Span, Term, spans
from prunekit.pruning.graph.gate_expr import UNGATED, GateExpr, append_gate, parallel, serial
from prunekit.pruning.graph.recorder import Op, Record, Value
from prunekit.pruning.graph.rules.base import RULES, SOFTMAX, is_elementwise

NORMS = ("batch_norm", "instance_norm")
STATISTICAL = ("layer_norm", "group_norm", "rms_norm")
# Of operations that are not elementwise, those that are not zero where their input is.
SHIFTING = {
    "log_softmax",
    "_log_softmax",
    "logsumexp",
    "logcumsumexp",
    "argmax",
    "argmin",
    "argsort",
}
SHIFTING |= {"fill", "normal", "uniform", "exponential", "bernoulli", "random"}


@dataclass(frozen=True)
class State:
    """What is known of channels that one span of an axis holds."""

    gate_expr: GateExpr = UNGATED  # the gates that they have passed
    shifted: bool = False  # whether what was zero after the last gate, or where it was made, may not be now
    padded: bool = False  # whether a padding, of any amount, may have set positions to another value


PRODUCTS = ("matmul", "bmm", "mm", "mv", "dot")

UNKNOWN = State(shifted=True)
ZERO = State()


class ZeroStates:
    """The states of all values of a record.

    Args:
        record: with axes.
        own: names of the parameters, which are zero for a channel without weights; buffers are not.
        gates: the weights of norms that are gates, with the norms' names.
        contractions: the operations that sum over channels, whose outputs' channels are new.
    """

    def __init__(self, record: Record, own: Collection[str], gates: dict[Value, str], contractions: set[Op]):
        self._spans: dict[int, tuple[Term, list[Span]]] = {}
        self._states: dict[Value, list[list[State]]] = {}
        self._gates = gates
        self._contractions = contractions
        parameters = {record.tensors[name] for name in record.tensors if name in own}
        for op in record.ops:
            for value in op.inputs:
                if value not in self._states:
                    self._set(value, ZERO if value in parameters else UNKNOWN)
            self._apply(op)

    def spans(self, term: Term) -> list[Span]:
        if id(term) not in self._spans:
            self._spans[id(term)] = term, list(spans(term))
        return self._spans[id(term)][1]

    def of(self, value: Value, axis: int) -> list[State]:
        return self._states[value][axis]

    def _set(self, value: Value, state: State) -> None:
        self._states[value] = [[state] * len(self.spans(term)) for term in value.axes]

    def _apply(self, op: Op) -> None:
        tensors = [value for value in op.inputs if value.axes]
        name = op.name.removesuffix("_")
        larger = name in ("max", "min") and len(op.inputs) > 1
        elementwise = larger or (is_elementwise(op.name, op.func) and name not in RULES)
        for number, output in enumerate(op.outputs):
            states = []
            for axis, term in enumerate(output.axes):
                own = self.spans(term)
                if not own:
                    states.append([])
                elif elementwise:
                    states.append(self._elementwise(op, output, axis, own))
                else:
                    states.append(self._carried(op, tensors, number, axis, own))
            self._states[output] = states

    def _elementwise(self, op: Op, output: Value, axis: int, own: Sequence[Span]) -> list[State]:
        rank = len(output.axes)
        sides: list[list[State] | None] = []
        for value in op.inputs:
            index = axis - rank + len(value.axes)
            matches = index >= 0 and value.axes[index].size == output.axes[axis].size
            sides.append(self._aligned(value, index, own) if matches else None)
        zeroing, keeps_zero = _zero_profile(op)
        result = []
        for number in range(len(own)):
            states = [side[number] if side is not None else None for side in sides]
            result.append(_combined(states, zeroing, keeps_zero))
        return result

    def _aligned(self, value: Value, axis: int, own: Sequence[Span]) -> list[State]:
        known = self.spans(value.axes[axis])
        if [span.leaf for span in known] == [span.leaf for span in own]:
            return self._states[value][axis]
        return [UNKNOWN] * len(own)

    def _carried(self, op: Op, tensors: Sequence[Value], number: int, axis: int, own: Sequence[Span]) -> list[State]:
        output = op.outputs[number]
        if op.name.rstrip("_") == "_mutated":
            return [UNKNOWN] * len(own)
        if not tensors:
            return [ZERO if op.name in ("zeros", "new_zeros", "zeros_like") else UNKNOWN] * len(own)
        if op.name in NORMS:
            return self._normed(op, axis)
        if op in self._contractions and op.name.startswith(("conv", "linear")):
            weight = op.args[1]
            made = len(output.axes) - (1 if op.name == "linear" else len(weight.axes) - 1)
            if axis == made:
                return self._aligned(weight, 1 if "transpose" in op.name else 0, own)
            states = self._found(op, [op.args[0]], number, axis, own)
            biased = op.arg(2, "bias") is not None
            return [replace(state, shifted=True) for state in states] if biased else states
        if op.name not in PRODUCTS and op.name != "stack" and op.args and isinstance(op.args[0], Value):
            tensors = [op.args[0], *(value for value in tensors if value is not op.args[0])]
        states = self._found(op, tensors, number, axis, own)
        if op.name in STATISTICAL:
            over = {1} if op.name == "group_norm" else set(range(len(output.axes) - len(op.args[1]), len(output.axes)))
            # What is pruned does not come out of the reference, whatever goes in; zeros of another axis get the bias.
            return [State() for _ in own] if axis in over else [replace(state, shifted=True) for state in states]
        if op.name in SOFTMAX:
            # What is pruned does not come out of the reference; rows of zeros of other channels give equal shares.
            left_out = {span.leaf for span in self.spans(output.axes[op.args[1]])}
            pairs = zip(states, own, strict=True)
            return [State() if s.leaf in left_out else replace(state, shifted=True) for state, s in pairs]
        if number and op.name in ("max", "min", "sort", "topk", "median", "mode", "kthvalue", "cummax", "cummin"):
            return [UNKNOWN] * len(own)  # places
        if op.name == "scaled_dot_product_attention" and axis == len(output.axes) - 2:
            return [UNKNOWN] * len(own)  # a query of zero is answered with a mean
        if op.name in ("addmm", "baddbmm", "addmv") and axis != len(output.axes) - 1:
            return [replace(state, shifted=True) for state in states]
        if op.name.removesuffix("_") in SHIFTING:
            return [replace(state, shifted=True) for state in states]
        filled = _fills(op)
        return [replace(s, padded=True, shifted=s.shifted or filled) for s in states] if _pads(op, axis) else states

    def _normed(self, op: Op, axis: int) -> list[State]:
        value, weight = op.args[0], op.args[1]
        states = self._states[value][axis]
        measures = bool(op.arg(5, "training"))  # rather than subtract running means
        if axis != 1:
            return [State() if measures else replace(state, shifted=True) for state in states]
        name = self._gates.get(weight) if isinstance(weight, Value) else None
        if name is None:
            shifts = not measures or op.arg(2, "bias") is not None
            return [replace(state, shifted=state.shifted or shifts) for state in states]
        own = self.spans(value.axes[1])
        return [
            State(_gated(state.gate_expr, name, span), False, state.padded)
            for state, span in zip(states, own, strict=True)
        ]

    def _found(self, op: Op, tensors: Sequence[Value], number: int, axis: int, own: Sequence[Span]) -> list[State]:
        """The states of the axis of an input that this axis is, or is part of."""
        wanted, output = [span.leaf for span in own], op.outputs[number]
        if op.name in ("cat", "concat", "concatenate"):
            sides = [value for value in op.args[0] if len(value.axes) == len(output.axes)]
            joined = [state for value in sides for state in self._states[value][axis]]
            if [span.leaf for value in sides for span in self.spans(value.axes[axis])] == wanted:
                return joined
            aligned = [self._aligned(value, axis, own) for value in sides]
            return [_parallel(states) for states in zip(*aligned, strict=True)]
        if op.name == "stack":
            inner = axis - (axis > op.arg(1, "dim", 0) % len(output.axes))
            sides = [self._aligned(value, inner, own) for value in tensors]
            return [_parallel(states) for states in zip(*sides, strict=True)]
        if op.name in PRODUCTS and len(output.axes) > 1 and axis >= len(output.axes) - 2:
            # Rows are those of the first, columns of the second.
            side, place = (op.args[0], -2) if axis == len(output.axes) - 2 else (op.args[1], -1)
            if len(side.axes) > 1:
                return self._aligned(side, len(side.axes) + place, own)
        candidates: list[list[State]] = []
        preferred = [op.args[2]] if op.name == "scaled_dot_product_attention" else []
        for value in preferred or tensors:
            for other, term in enumerate(value.axes):
                known = [span.leaf for span in self.spans(term)]
                start = _offset(op, number, other, self.spans(term))
                places = [first for first, leaf in enumerate(known) if leaf is wanted[0]]
                for first in places if start is None else [start]:
                    if known[first : first + len(wanted)] == wanted:
                        candidates.append(self._states[value][other][first : first + len(wanted)])
        if not candidates:
            return [self._state_of_leaf(tensors, leaf) for leaf in wanted]
        if op.name in PRODUCTS:
            # A product over another axis: zero where either side is.
            return [
                State(UNGATED, all(s.shifted for s in states), any(s.padded for s in states))
                for states in zip(*candidates, strict=True)
            ]
        return candidates[0]  # of the data, not of what the parameters of a layer have of it

    def _state_of_leaf(self, tensors: Sequence[Value], leaf: Leaf) -> State:
        found = {
            state
            for value in tensors
            for axis, term in enumerate(value.axes)
            for span, state in zip(self.spans(term), self._states[value][axis], strict=True)
            if span.leaf is leaf
        }
        return next(iter(found)) if len(found) == 1 else UNKNOWN


def _parallel(states: Sequence[State]) -> State:
    """The state of entries that are those of several tensors."""
    exprs = parallel(state.gate_expr for state in states)
    return State(exprs, any(state.shifted for state in states), any(state.padded for state in states))


def _gated(expr: GateExpr, norm: str, span: Span) -> GateExpr:
    """The expression after a norm: a channel with several entries is zero when the gates of all of them are."""
    if span.stride > 1 or len(span.repeats) > 1:
        return expr  # its gates are not side by side
    starts = [span.offset]
    for count, period in span.repeats:
        starts = [span.offset + number * period for number in range(count)]
    return parallel(append_gate(expr, norm, start) for start in starts)


def _offset(op: Op, number: int, axis: int, known: Sequence[Span]) -> int | None:
    """Where a slice, or a part of a split, begins among the spans of the axis that it cuts."""
    is_split = "split" in op.name or op.name.endswith("chunk")
    if not is_split and op.name not in ("slice", "narrow"):
        return None
    if op.arg(2 if is_split else 1, "dim", 0) % len(op.args[0].axes) != axis:
        return None
    if is_split:
        start = sum(output.shape[axis] for output in op.outputs[:number])
    else:
        start, size = op.arg(2, "start") or 0, op.args[0].shape[axis]
        start = max(start + size if start < 0 else start, 0)
    return next((number for number, span in enumerate(known) if span.offset == start), 0)


def _pads(op: Op, axis: int) -> bool:
    """Return whether an operation may fill positions of other axes with a value that is not the channel's."""
    if op.name in ("constant_pad_nd", "pad"):
        return True
    if op.name.startswith("avg_pool"):
        padding, counts = op.arg(3, "padding", 0), op.arg(5, "count_include_pad", True)
        return bool(counts) and any(padding if isinstance(padding, list | tuple) else [padding])
    return False


def _fills(op: Op) -> bool:
    """Return whether a padding has another number than zero."""
    value = op.arg(2, "value") if op.name == "constant_pad_nd" else op.arg(3, "value") if op.name == "pad" else 0
    return bool(value)


def _combined(states: Sequence[State | None], zeroing: Sequence[bool], keeps_zero: bool) -> State:
    known = [state for state in states if state is not None]
    padded = any(state.padded for state in known)
    makes_zero = [state for state, does in zip(states, zeroing, strict=True) if state is not None and does]
    if makes_zero:
        expr, shifted = makes_zero[0].gate_expr, makes_zero[0].shifted
        for other in makes_zero[1:]:
            if shifted == other.shifted:
                expr = serial(expr, other.gate_expr)
            elif shifted:  # The gate of a factor such as sigmoid(bn(x)) does not make the product zero.
                expr = other.gate_expr
            shifted = shifted and other.shifted
        return State(expr, shifted, padded)
    all_known = len(known) == len(states)
    shifted = any(state.shifted for state in known) or not (keeps_zero and all_known)
    return State(parallel(state.gate_expr for state in known), shifted, padded)


def _zero_profile(op: Op) -> tuple[tuple[bool, ...], bool]:
    """Return, for each tensor of an elementwise operation, whether its zeros alone make zeros of the result, and
    whether zeros in all of them do. The operation is tried on a few numbers."""
    inputs = op.inputs
    masks = tuple(value.is_mask for value in inputs)
    numbers = iter(range(len(inputs)))
    template = tree_map_only(Value, lambda _: _Slot(next(numbers)), (op.args, op.kwargs))
    key = op.func, masks, repr(template)
    try:
        if key not in _PROFILES:
            _PROFILES[key] = _profile(op.func, masks, template)
        return _PROFILES[key]
    except Exception:  # such as an overload with an output tensor
        return (False,) * len(inputs), False


class _Slot(int):
    """The place of a tensor among the arguments."""

    def __repr__(self) -> str:
        return f"<{int(self)}>"


_PROFILES: dict[Any, tuple[tuple[bool, ...], bool]] = {}


def _profile(func: Any, masks: tuple[bool, ...], template: Any) -> tuple[tuple[bool, ...], bool]:
    generator = torch.Generator().manual_seed(0)

    def run(zeros: set[int]) -> bool:
        tensors = [
            torch.rand(64, generator=generator, dtype=torch.float64) * 4 - 2 if not mask else torch.arange(64) % 2 == 0
            for mask in masks
        ]
        for number in zeros:
            tensors[number] = torch.zeros_like(tensors[number])
        args, kwargs = tree_map_only(_Slot, lambda slot: tensors[slot], template)
        with torch.no_grad():
            result = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
        return all(not leaf.isnan().any() and not leaf.any() for leaf in result)

    return tuple(run({number}) for number in range(len(masks))), run(set(range(len(masks))))
