"""Convolutions, linear layers, pooling, resampling and padding."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunekit.pruning.graph.axes import CONVS, is_channelwise
from prunekit.pruning.graph.axis_terms import Fixed, Leaf, Term, cat, lock, prod
from prunekit.pruning.graph.recorder import Op, Value
from prunekit.pruning.graph.rules.base import AxisGraph, register_rule
from prunekit.pruning.graph.rules.matmul import contract


@register_rule("linear")
def linear(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    value, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    _read(op, graph, value, len(value.axes) - 1, weight, len(weight.axes) - 1)
    outputs = [weight.axes[0]] if len(weight.axes) > 1 else []
    if bias is not None and outputs:
        graph.unify(op, bias.axes[0], weight.axes[0])
    return [[*value.axes[:-1], *outputs]]


def _read(op: Op, graph: AxisGraph, value: Value, value_axis: int, weight: Value, axis: int) -> None:
    if weight.name is None:
        contract(op, graph, value, value_axis, weight, axis)
        return
    graph.unify(op, value.axes[value_axis], weight.axes[axis])
    graph.read(op, weight, axis, value, value_axis)


@register_rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]] | None:
    value, weight, bias = op.args[0], op.args[1], op.arg(2, "bias")
    general = op.name in ("convolution", "_convolution")
    transposed = op.args[6] if general else "transpose" in op.name
    groups = op.args[8] if general else op.arg(6, "groups", 1)
    sides = [Fixed(side) for side in op.outputs[0].shape[-(len(weight.shape) - 2) :]]
    axis = len(value.axes) - len(weight.shape) + 1  # 0 without an axis of images
    images, channels = list(value.axes[:axis]), value.axes[axis]
    graph.lock(op, [*value.axes[axis + 1 :], *weight.axes[2:]], "as positions")
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    depthwise = _is_depthwise(op, graph, weight, groups, transposed)
    outputs: Term = weight.axes[out_axis]
    if depthwise:
        graph.unify(op, prod([channels, Fixed(weight.shape[0] // channels.size)]), weight.axes[0])
        outputs, weight.axes[1] = weight.axes[0], Fixed(1)
    elif groups == 1:
        _read(op, graph, value, axis, weight, in_axis)
    else:
        outputs = _grouped(op, graph, value, axis, weight, groups, transposed)
    if bias is not None:
        graph.unify(op, bias.axes[0], outputs)
    return [[*images, outputs, *sides]]


def _is_depthwise(op: Op, graph: AxisGraph, weight: Value, groups: int, transposed: bool) -> bool:
    if weight.name == f"{op.module}.weight" and not transposed:
        module = graph.modules[op.module]
        if isinstance(module, CONVS):
            return is_channelwise(graph.model, op.module)
    return not transposed and groups > 1 and weight.shape[1] == 1 and weight.shape[0] % groups == 0


def _grouped(op: Op, graph: AxisGraph, value: Value, axis: int, weight: Value, groups: int, transposed: bool) -> Term:
    """A convolution whose groups of outputs read their own channels; its groups stay of equal size."""
    channels, outputs = value.axes[axis], weight.axes[0]
    why = None
    if transposed:
        why, outputs = f"a transposed convolution with {groups} groups", Leaf(op.outputs[0].shape[axis])
        lock(weight.axes[0], why)
        lock(weight.axes[1], why)
    elif not isinstance(graph.modules[op.module], CONVS) or weight.name != f"{op.module}.weight":
        why = "a function with groups"
    if why:
        name = op.module or op.name
        lock(channels, f"read by {name}, which is not supported: {why}")
        lock(outputs, f"produced by {name}, {why}")
        return outputs
    whole = graph.virtual.setdefault((weight.name or "", 1), Leaf(channels.size))
    graph.unify(op, channels, whole)
    graph.read(op, weight, 1, value, axis)
    return outputs


_SPATIAL = re.compile(r"(?:pool|upsample_\w*?|_pad)(\d)d")


@register_rule(
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "_adaptive_avg") for n in (1, 2, 3))
)
@register_rule(*(f"max_pool{n}d_with_indices" for n in (1, 2, 3)))
@register_rule(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
@register_rule(*(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")))
@register_rule(*(f"upsample_{kind}" for kind in ("trilinear3d", "bicubic2d")), "_upsample_nearest_exact2d")
@register_rule(
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d", "lp_pool2d", "lp_pool1d"
)
@register_rule("grid_sampler_2d", "grid_sampler", "grid_sampler_3d", "fractional_max_pool2d")
def resample(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """Work on the last axes of each channel alone."""
    value = op.args[0]
    found = _SPATIAL.search(op.name)
    spatial = int(found.group(1)) if found else len(value.axes) - 2
    graph.lock(op, value.axes[-spatial:])
    outer = list(value.axes[:-spatial])
    return [[*outer, *(Fixed(side) for side in output.shape[-spatial:])] for output in op.outputs]


@register_rule("constant_pad_nd", "pad")
def pad(op: Op, graph: AxisGraph) -> Sequence[Sequence[Term]]:
    """Padding with a number adds entries that are not pruned beside those of the axis."""
    axes, amounts = list(op.args[0].axes), op.args[1]
    is_constant = op.name == "constant_pad_nd" or op.arg(2, "mode", "constant") == "constant"
    for axis, before, after in zip(range(len(axes) - 1, -1, -1), amounts[::2], amounts[1::2], strict=False):
        if is_constant and before >= 0 and after >= 0:
            axes[axis] = cat([Fixed(before), axes[axis], Fixed(after)])
        elif before or after:
            graph.lock(op, [axes[axis]])
            axes[axis] = Fixed(op.outputs[0].shape[axis])
    return [axes]
