"""Operations along some axes, which leave the others alone."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.pruning.graph.axis_terms import Fixed, Term
from prunekit.pruning.graph.recorder import Op
from prunekit.pruning.graph.rules.base import SOFTMAX, AxisGraph, broadcast, register_rule


@register_rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "argmax", "argmin"
)
@register_rule(
    "logsumexp", "prod", "any", "all", "var_mean", "std_mean", "median", "aminmax", "nansum", "count_nonzero"
)
@register_rule("mode", "quantile")
def reduce(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    if len(op.inputs) > 1:  # the larger of two
        return [broadcast(op, graph, op.inputs, len(op.outputs[0].shape))]
    value = op.args[0]
    rank = len(value.axes)
    position = 2 if op.name in ("norm", "linalg_vector_norm", "quantile") else 1
    given = op.arg(position, "dim")
    given = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    over = {axis % rank for axis in given} if isinstance(given, list | tuple) and given else set(range(rank))
    for axis in over:
        if op.name in ("sum", "mean", "norm", "linalg_vector_norm"):
            graph.zeroed.append((op, [(value, axis)]))
            if op.name == "mean":
                graph.statistic(op, value, axis)
        else:
            graph.lock(op, [value.axes[axis]])
    kept = [axis for axis in range(rank) if axis not in over]
    result = []
    for output in op.outputs:
        keepdim = len(output.shape) == rank
        result.append([Fixed(1) if a in over else value.axes[a] for a in (range(rank) if keepdim else kept)])
    return result


@register_rule(
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "argsort", "roll", "flip"
)
@register_rule(
    "topk", "logcumsumexp", "renorm", "_safe_softmax", "cummax", "softmin", "msort", "kthvalue", "_fft_r2c", "_fft_c2r"
)
@register_rule(
    "_fft_c2c", "fft_rfft2", "fft_irfft2", "fft_fft2", "fft_ifft2", "fft_rfft", "fft_irfft", "fft_fft", "fft_ifft"
)
def along(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """Mix the entries of some axes; nothing of those axes can be pruned, except that a softmax is over what is left."""
    value = op.args[0]
    rank = len(value.axes)
    over = _axes(op, rank)
    if op.name in SOFTMAX:
        for axis in over:
            graph.statistic(op, value, axis)
        return [list(value.axes)]
    graph.lock(op, [value.axes[axis] for axis in over])
    return [
        [Fixed(output.shape[axis]) if axis in over else value.axes[axis] for axis in range(rank)]
        for output in op.outputs
    ]


def _axes(op: Op, rank: int) -> set[int]:
    position = 2 if op.name in ("topk", "roll", "renorm", "kthvalue") or op.name.startswith("fft_") else 1
    default = {"roll": (), "msort": (0,)}.get(op.name, (-2, -1) if op.name.endswith("fft2") else (-1,))
    given = op.arg(position, "dims" if op.name in ("roll", "flip") else "dim")
    given = default if given is None else [given] if isinstance(given, int) else given
    return {axis % rank for axis in given or range(rank)}  # without axes, the tensor is flattened
