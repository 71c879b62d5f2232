"""Concatenation, splits, slices and indices."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.pruning.graph.axis_terms import Fixed, Term, cat, split
from prunekit.pruning.graph.recorder import Op, Value
from prunekit.pruning.graph.rules.base import AxisGraph, fixed, register_rule


@register_rule("cat", "concat", "concatenate")
def concatenate(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    rank = len(op.outputs[0].shape)
    values = [value for value in op.args[0] if len(value.shape) == rank]
    axis = op.arg(1, "dim", 0) % rank
    axes = list(values[0].axes)
    for other in values[1:]:
        for index in range(rank):
            if index != axis:
                graph.unify(op, axes[index], other.axes[index])
    axes[axis] = cat([value.axes[axis] for value in values])
    return [axes]


@register_rule("stack")
def stack(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    values, rank = op.args[0], len(op.outputs[0].shape)
    axis = op.arg(1, "dim", 0) % rank
    axes = list(values[0].axes)
    for other in values[1:]:
        for a, b in zip(axes, other.axes, strict=True):
            graph.unify(op, a, b)
    axes.insert(axis, Fixed(len(values)))
    return [axes]


@register_rule(
    "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"
)
def split_axis(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    """Parts of a chunk must stay of equal length, so they lose the same channels."""
    value, rank = op.args[0], len(op.args[0].axes)
    axis = op.arg(2, "dim", 0) % rank
    parts: list[Term] = []
    left = value.axes[axis]
    for output in op.outputs:
        both = split(left, output.shape[axis])
        if both is None:
            return None
        parts.append(both[0])
        left = both[1]
    if op.name.endswith("chunk"):
        if len({part.size for part in parts}) > 1:
            return None
        for other in parts[1:]:
            graph.unify(op, parts[0], other)
    return [[*value.axes[:axis], part, *value.axes[axis + 1 :]] for part in parts]


@register_rule("slice", "narrow")
def slice_axis(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    value = op.args[0]
    axes = list(value.axes)
    axis = op.arg(1, "dim", 0) % len(axes)
    length, size = op.outputs[0].shape[axis], value.shape[axis]
    if length == size:
        return [axes]
    start = op.arg(2, "start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if op.name == "slice" and op.arg(4, "step", 1) != 1:
        graph.lock(op, [axes[axis]])
        axes[axis] = Fixed(length)
        return [axes]
    tail = split(axes[axis], start)
    part = tail and split(tail[1], length)
    if part is None:
        graph.lock(op, [axes[axis]])
        axes[axis] = Fixed(length)
    else:
        axes[axis] = part[0]
    return [axes]


@register_rule("select", "unbind")
def select(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    value = op.args[0]
    axis = op.arg(1, "dim", 0) % len(value.axes)
    graph.lock(op, [value.axes[axis]])
    return [[term for index, term in enumerate(value.axes) if index != axis]] * len(op.outputs)


@register_rule("index_select", "gather", "take_along_dim")
def index_select(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    value = op.args[0]
    axis = op.arg(1, "dim") % len(value.axes)
    axes = list(value.axes)
    if op.name == "index_select":
        graph.lock(op, [axes[axis]])
        axes[axis] = Fixed(op.outputs[0].shape[axis])
        return [axes]
    graph.lock(op, axes)
    return [fixed(op.outputs[0].shape)]


@register_rule("index")
def index(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """Axes that are not indexed stay; those of the indices take the place of the others."""
    value, indices, output = op.args[0], op.args[1], op.outputs[0]
    indexed, axis = [], 0
    for own in indices:
        used = 0 if own is None else (len(own.shape) if _is_mask(own, value, axis) else 1)
        indexed += range(axis, axis + used)
        axis += max(used, 1)
    graph.lock(op, [value.axes[axis] for axis in indexed])
    kept = [axis for axis in range(len(value.axes)) if axis not in indexed]
    new = len(output.shape) - len(kept)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    first = indexed[0] if adjacent and indexed else 0
    axes: list[Term] = [value.axes[axis] for axis in kept]
    axes[first:first] = fixed(output.shape[first : first + new])
    return [axes]


def _is_mask(own: Value, value: Value, axis: int) -> bool:
    return len(own.shape) > 1 and own.shape == value.shape[axis : axis + len(own.shape)] and own.is_mask


@register_rule("index_put", "scatter", "scatter_add", "index_add", "index_copy", "masked_scatter", "scatter_reduce")
@register_rule("select_scatter", "slice_scatter", "index_fill")
def write(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """What is written to at computed places keeps all of its entries."""
    for value in op.inputs:
        graph.lock(op, value.axes)
    return [list(op.args[0].axes)]
