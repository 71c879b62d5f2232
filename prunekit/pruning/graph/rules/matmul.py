"""Products of matrices, and attention."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.pruning.graph.axis_terms import Fixed, Term, prod
from prunekit.pruning.graph.recorder import Op, Value
from prunekit.pruning.graph.rules.base import AxisGraph, broadcast, register_rule


def contract(op: Op, graph: AxisGraph, a: Value, a_axis: int, b: Value, b_axis: int) -> None:
    """Sum products over an axis of both."""
    a_axis, b_axis = a_axis % len(a.axes), b_axis % len(b.axes)
    graph.unify(op, a.axes[a_axis], b.axes[b_axis])
    # What is pruned must add nothing to the sum.
    graph.zeroed.append((op, [(a, a_axis), (b, b_axis)]))


@register_rule("mm", "bmm", "matmul", "mv", "dot", "linalg_matmul", "inner_product", "vdot")
def matmul(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    a, b = op.args[0], op.args[1]
    contract(op, graph, a, -1, b, -2 if len(b.axes) > 1 else 0)
    rows = list(a.axes[:-1])[-1:] if len(a.axes) > 1 else []
    columns = list(b.axes[-1:]) if len(b.axes) > 1 else []
    return [[*_batch(op, graph, a, b), *rows, *columns]]


def _batch(op: Op, graph: AxisGraph, *values: Value, inner: int = 2) -> list[Term]:
    """The axes before the last two, which are broadcast."""
    outer = [Value(value.shape[:-inner], axes=list(value.axes[:-inner])) for value in values]
    return broadcast(op, graph, outer, max(len(value.axes) for value in outer))


@register_rule("addmm", "baddbmm")
def addmm(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    bias, a, b = op.args[:3]
    contract(op, graph, a, -1, b, -2)
    product = Value(op.outputs[0].shape, axes=[*_batch(op, graph, a, b), a.axes[-2], b.axes[-1]])
    return [broadcast(op, graph, [product, bias], len(product.axes))]


@register_rule("scaled_dot_product_attention")
def attention(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    query, key, value = op.args[:3]
    mask = op.arg(3, "attn_mask")
    contract(op, graph, query, -1, key, -1)
    if op.arg(6, "scale") is None:
        graph.statistic(op, query, len(query.axes) - 1)  # its length scales the products
    graph.unify(op, key.axes[-2], value.axes[-2])
    graph.lock(op, [key.axes[-2]])
    if op.kwargs.get("enable_gqa") and 1 < key.shape[-3] < query.shape[-3]:
        # As many queries for each head of keys and values, whose number may change (grouped-query attention).
        graph.unify(op, key.axes[-3], value.axes[-3])
        shared = Fixed(query.shape[-3] // key.shape[-3])
        graph.unify(op, query.axes[-3], prod([key.axes[-3], shared]))
        batch = list(query.axes[:-2])
    else:
        batch = _batch(op, graph, query, key, value)
    if isinstance(mask, Value):
        for axis, term in enumerate(reversed(mask.axes[:-2])):
            if term.size > 1:
                graph.unify(op, term, batch[-1 - axis])
    return [[*batch, query.axes[-2], value.axes[-1]]]


@register_rule("cdist", "_cdist_forward")
def cdist(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    a, b = op.args[:2]
    graph.lock(op, [a.axes[-1], b.axes[-1]])
    return [[*_batch(op, graph, a, b), a.axes[-2], b.axes[-2]]]


@register_rule("outer", "ger")
def outer(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    return [[op.args[0].axes[0], op.args[1].axes[0]]]


@register_rule("embedding")
def embedding(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    weight, indices = op.args[0], op.args[1]
    graph.lock(op, [weight.axes[0]], "which looks up its rows")
    return [[*(Fixed(side) for side in indices.shape), weight.axes[1]]]
