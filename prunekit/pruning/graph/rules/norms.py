"""Norms."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.pruning.graph.axes import NORMS
from prunekit.pruning.graph.axis_terms import Term, factor
from prunekit.pruning.graph.recorder import Op, Value
from prunekit.pruning.graph.rules.base import AxisGraph, fixed, register_rule


@register_rule("batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
@register_rule("_native_batch_norm_legit_no_training", "native_batch_norm_legit")
def batch_norm(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """A norm of each channel alone, over the other axes where it computes statistics.

    These may be channels, too, such as the inputs of a weight that is standardized (Qiao et al., 2019).
    """
    value, module = op.args[0], graph.modules[op.module]
    if not any(isinstance(tensor, Value) for tensor in op.args[1:5]) and isinstance(module, NORMS):
        graph.counts.append((f"{op.module}.num_features", value.axes[1]))
    for tensor in op.args[1:5]:
        if isinstance(tensor, Value):
            graph.unify(op, tensor.axes[0], value.axes[1])
    if op.arg(5, "training", op.name == "instance_norm"):
        for axis in (0, *range(2, len(value.axes))):
            graph.statistic(op, value, axis)
    outputs = [list(value.axes)]
    return [*outputs, *([value.axes[1]] for output in op.outputs[1:])]


@register_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    value, sides = op.args[0], op.args[1]
    first = len(value.axes) - len(sides)
    for tensor in op.args[2:4]:
        if isinstance(tensor, Value):
            for axis, term in enumerate(tensor.axes, first):
                graph.unify(op, term, value.axes[axis])
    for axis in range(first, len(value.axes)):
        graph.statistic(op, value, axis)
    axes = list(value.axes)
    statistics = [[*axes[:first], *fixed(output.shape[first:])] for output in op.outputs[1:]]
    return [axes, *statistics]


@register_rule("group_norm")
def group_norm(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    """Its groups stay of equal size, and none is removed."""
    value, groups = op.args[0], op.args[1]
    parts = factor(value.axes[1], value.axes[1].size // groups)
    if parts is None:
        return None
    graph.lock(op, [parts[0]], "whose number of groups stays")
    for tensor in (op.arg(2, "weight"), op.arg(3, "bias")):
        if isinstance(tensor, Value):
            graph.unify(op, tensor.axes[0], value.axes[1])
    graph.statistic(op, value, 1)
    return [list(value.axes)]
