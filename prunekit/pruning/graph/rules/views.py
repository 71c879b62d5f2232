"""Reshapes, permutations and other operations that move entries without computing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunekit.pruning.graph.axis_terms import Fixed, Term, factor, prod
from prunekit.pruning.graph.recorder import Op
from prunekit.pruning.graph.rules.base import AxisGraph, new_leaves, register_rule


@register_rule(
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"
)
@register_rule("squeeze_copy", "view_copy")
def reshape(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    """Entries stay in order: axes are merged and split."""
    if op.outputs[0].shape and math.prod(op.outputs[0].shape) == 0:
        graph.lock(op, op.args[0].axes)
        return [[Fixed(side) for side in op.outputs[0].shape]]
    axes = reshaped(op.args[0].axes, op.outputs[0].shape)
    return None if axes is None else [axes]


def reshaped(axes: Sequence[Term], shape: Sequence[int]) -> list[Term] | None:
    """Return the axes of a tensor of another shape with the same entries in the same order."""
    result: list[Term] = []
    left = list(axes)
    sides = list(shape)
    while left or sides:
        if left and sides and left[0].size == sides[0]:
            result.append(left.pop(0))
            sides.pop(0)
            continue
        if sides and sides[0] == 1:
            result.append(Fixed(1))
            sides.pop(0)
            continue
        if left and left[0].size == 1:
            prod([left.pop(0)])  # locks it
            continue
        # The fewest axes on both sides that have as many entries.
        before, after = [left.pop(0)], [sides.pop(0)]
        while (have := math.prod(term.size for term in before)) != (want := math.prod(after)):
            if have < want:
                before.append(left.pop(0))
            else:
                after.append(sides.pop(0))
        whole: Term = prod(before)
        inner: list[Term] = []
        for side in reversed(after[1:]):
            parts = factor(whole, side)
            if parts is None:
                return None
            whole = parts[0]
            inner.insert(0, parts[1])
        result += [whole, *inner]
    return result


@register_rule("permute")
def permute(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes = op.args[0].axes
    return [[axes[axis] for axis in op.arg(1, "dims")]]


@register_rule("transpose", "swapaxes", "swapdims", "t")
def transpose(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes = list(op.args[0].axes)
    if len(axes) < 2:
        return [axes]
    a, b = (0, 1) if op.name == "t" else (op.args[1], op.args[2])
    axes[a], axes[b] = axes[b], axes[a]
    return [axes]


@register_rule("expand", "expand_as", "broadcast_to")
def expand(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes, shape = op.args[0].axes, op.outputs[0].shape
    # The code takes a size to expand to from another tensor, or the slim model fails.
    result = new_leaves(shape)
    for axis, term in enumerate(axes, len(shape) - len(axes)):
        if term.size == shape[axis]:
            result[axis] = term
        else:
            graph.lock(op, [term])
    return [result]


@register_rule("repeat")
def repeat(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes, times = op.args[0].axes, op.args[1]
    axes = [*[Fixed(1)] * (len(times) - len(axes)), *axes]
    return [[_repeated(term, n) for term, n in zip(axes, times, strict=True)]]


@register_rule("repeat_interleave")
def repeat_interleave(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    axis, times = op.arg(2, "dim"), op.arg(1, "repeats")
    if axis is None or not isinstance(times, int):
        return None
    axes = list(op.args[0].axes)
    axes[axis] = prod([axes[axis], *new_leaves([times])])
    return [axes]


def _repeated(term: Term, times: int) -> Term:
    if times == 1:
        return term
    return new_leaves([times])[0] if term.size == 1 else prod([*new_leaves([times]), term])


@register_rule("pixel_shuffle")
def pixel_shuffle(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    """Shi et al., CVPR 2016: (…, C·r², H, W) → (…, C, H·r, W·r)."""
    axes, scale = op.args[0].axes, op.args[1]
    parts = factor(axes[-3], scale * scale)
    if parts is None:
        return None
    graph.lock(op, [parts[1]])
    return [[*axes[:-3], parts[0], *(Fixed(side) for side in op.outputs[0].shape[-2:])]]


@register_rule("pixel_unshuffle")
def pixel_unshuffle(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes, scale = op.args[0].axes, op.args[1]
    channels = prod([axes[-3], Fixed(scale * scale)])
    return [[*axes[:-3], channels, *(Fixed(side) for side in op.outputs[0].shape[-2:])]]


@register_rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    axes = list(op.args[0].axes)
    parts = factor(axes[1], axes[1].size // op.args[1])
    if parts is None:
        return None
    axes[1] = prod([parts[1], parts[0]])
    return [axes]


@register_rule("im2col")
def im2col(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """Patches of (N, C, H, W): (N, C·kernel, positions)."""
    axes, kernel = op.args[0].axes, math.prod(op.args[1])
    first = [axes[0]] if len(axes) == 4 else []
    return [[*first, prod([axes[-3], Fixed(kernel)]), Fixed(op.outputs[0].shape[-1])]]


@register_rule("col2im")
def col2im(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    axes, kernel = op.args[0].axes, math.prod(op.args[2])
    parts = factor(axes[-2], kernel)
    if parts is None:
        return None
    graph.lock(op, [parts[1]])
    first = [axes[0]] if len(axes) == 3 else []
    return [[*first, parts[0], *(Fixed(side) for side in op.outputs[0].shape[-2:])]]


@register_rule("unfold")
def windows(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes = list(op.args[0].axes)
    axis = op.args[1] % len(axes)  # the output has one more
    graph.lock(op, [axes[axis]])
    axes[axis] = Fixed(op.outputs[0].shape[axis])
    return [[*axes, Fixed(op.outputs[0].shape[-1])]]
