"""Operations on each entry alone, on entries at the same position, and tensors made from nothing."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.pruning.graph.axis_terms import Term, split
from prunekit.pruning.graph.recorder import Op
from prunekit.pruning.graph.rules.base import CONSTANT, AxisGraph, broadcast, locked, new_leaves, register_rule


@register_rule("pointwise", "dropout", "native_dropout", "alpha_dropout")
@register_rule("feature_dropout", "type_as", "lift_fresh", "lift", "alias", "detach", "clone")
@register_rule(
    "contiguous", "to", "_to_copy", "float", "fill", "zero", "_reshape_alias", "positive", "normal", "uniform"
)
@register_rule("exponential", "bernoulli", "random", "result_type", "bernoulli_p", "resolve_conj")
@register_rule("resolve_neg", "view_as_real_copy")
def pointwise(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    axes = broadcast(op, graph, op.inputs, max(len(value.shape) for value in op.outputs))
    return [axes] * len(op.outputs)


@register_rule("_mutated")
def mutated(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """A tensor that shares memory with one that was written to."""
    return [list(op.args[0].axes)]


@register_rule(
    "zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"
)
@register_rule(
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "rand",
    "randn",
    "empty_strided",
    "new_empty_strided",
    "scalar_tensor",
)
def creation(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """Tensors of equal entries have as many as the code asks for."""
    return [new_leaves(value.shape) for value in op.outputs]


@register_rule(
    "arange", "linspace", "eye", "tril_indices", "triu_indices", "randint", "randperm", "sym_size", "one_hot"
)
@register_rule("tensor", "hann_window", "_local_scalar_dense", "nonzero", "unique")
def constants(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    for value in op.inputs:
        graph.lock(op, value.axes)
    return [locked(value.shape, CONSTANT) for value in op.outputs]


@register_rule("prelu", "_prelu_kernel")
def prelu(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    value, slope = op.args[0], op.args[1]
    axes = list(value.axes)
    if len(slope.axes) == 1 and len(axes) > 1 and slope.shape[0] == axes[1].size:
        graph.unify(op, slope.axes[0], axes[1])
    elif slope.shape != (1,) and len(slope.axes) == 1:
        graph.lock(op, [*value.axes, *slope.axes])
    return [axes]


@register_rule("glu")
def glu(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    axes = list(op.args[0].axes)
    axis = op.arg(1, "dim", -1) % len(axes)
    parts = split(axes[axis], axes[axis].size // 2)
    if parts is None:
        return None
    graph.unify(op, *parts)
    axes[axis] = parts[0]
    return [axes]
