"""Operations on one input: those that keep the channels of the axis that is followed, and those that move the axis."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from prunekit.pruning.graph.gate_expr import GateExpr, shift
from prunekit.pruning.graph.trace import PRODUCT, SUMS, Node

# Operations on each entry alone.
ACTIVATIONS = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Hardtanh": "relu6",
    "Silu": "silu",
    "Gelu": "gelu",
    "Elu": "elu",
    "Hardswish": "hardswish",
    "Sigmoid": "sigmoid",
    "Hardsigmoid": "hardsigmoid",
    "Tanh": "tanh",
    "Mish": "mish",
}
ELEMENTWISE = {
    *ACTIVATIONS,
    *("Softplus", "Celu", "Threshold", "Hardshrink", "Softshrink", "LogSigmoid", "RreluWithNoise"),
    *("Abs", "Neg", "Exp", "Log", "Sqrt", "Rsqrt", "Reciprocal", "Rsub", "Erf", "Pow", "Clamp", "ClampMin", "ClampMax"),
    *("NativeDropout", "Clone", "ToCopy", "Alias"),
}
# Operations on each channel of (N, C, …) alone.
CHANNELWISE = {
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"),
    *("AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"),
    *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D"),
    *("UpsampleTrilinear3D", "UpsampleBicubic2D", "Expand"),
    *(f"{kind}Pad{n}D" for kind in ("Reflection", "Replication") for n in (1, 2, 3)),
}
# Those that are not zero at zero; so is a sum with a number.
SHIFTS = {"Sigmoid", "Hardsigmoid", "LogSigmoid", "Softplus", "Exp", "Log", "Reciprocal", "Rsqrt", "Rsub"}
# Reductions, over spatial axes or over channels.
REDUCTIONS = {"MeanBackward1", "SumBackward1", "AmaxBackward0", "AminBackward0"}
RESHAPES = {"View", "UnsafeView", "ReshapeAlias", "Squeeze"}


@dataclass
class Segment:
    """Consecutive channels of a tensor with one gate expression."""

    ids: np.ndarray  # identities of the channels, (channels,)
    gate_expr: GateExpr  # the gates that they have passed, for the first of them (see ``shift``)
    stride: int = 1  # entries per channel; more than 1 after a flatten
    padded: bool = False  # whether a padding, of any amount, may have set positions to another value
    shifted: bool = False  # whether what was zero after the last gate may not be now

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Segment:
        return replace(self, ids=self.ids[part], gate_expr=shift(self.gate_expr, part.start))


@dataclass
class Channels:
    """The channels of one axis of a tensor."""

    segments: list[Segment]
    axis: int = 1

    @property
    def entries(self) -> int:
        """The length of the axis."""
        return sum(len(segment) * segment.stride for segment in self.segments)


def keep_or_move(node: Node, channels: Channels) -> Channels | None:
    """Operations on one input that keep its channels or move their axis; None where the operation is not known."""
    axis, rank = channels.axis, len(node.inputs[0].out_shape or ()) if node.inputs else 0
    if node.kind in SHIFTS or node.op in SUMS:
        return replace(channels, segments=[replace(segment, shifted=True) for segment in channels.segments])
    if node.op in (PRODUCT, "DivBackward0") or node.kind in ELEMENTWISE:
        return channels  # with a number
    if axis >= rank:
        return None
    sides = next((int(letter) for letter in node.kind if letter in "123"), 0)  # of AvgPool2D, along the last axes
    if node.kind in CHANNELWISE and axis == 1 < rank - sides:
        return replace(channels, segments=_padded(channels)) if _pads(node) else channels
    if node.op == "ConstantPadNdBackward0" and node.out_shape:
        inside = len(node.grad_fn._saved_pad) <= 2 * (len(node.out_shape) - 1 - axis)
        return replace(channels, segments=_padded(channels)) if inside else None
    if node.kind in RESHAPES:
        return _reshape(node, channels)
    if node.kind in ("Permute", "Transpose", "T"):
        return replace(channels, axis=_permutation(node, rank).index(axis))
    axes = saved_axes(node, rank)
    if node.kind == "Unsqueeze":
        return replace(channels, axis=axis + sum(other <= axis for other in saved_axes(node, rank + 1)))
    if axis in axes:
        return None
    if node.op == "SliceBackward0":
        return channels
    if (node.op in REDUCTIONS or node.kind == "Select") and 0 not in axes and node.out_shape:
        return replace(channels, axis=axis - sum(other < axis for other in axes) * (len(node.out_shape) < rank))
    return None


def _padded(channels: Channels) -> list[Segment]:
    return [replace(segment, padded=True) for segment in channels.segments]


def _pads(node: Node) -> bool:
    """Return whether a pooling fills positions at the border, whatever the amount at this size."""
    is_average = node.kind.startswith("AvgPool")
    return is_average and node.grad_fn._saved_count_include_pad and any(node.grad_fn._saved_padding)


def _reshape(node: Node, channels: Channels) -> Channels | None:
    """A view that keeps the axis of channels, or merges it with those after it: each channel has several entries."""
    before = tuple(int(side) for side in getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    after, axis = node.out_shape, channels.axis
    if not before or not after or len(before) <= axis:
        return None
    outer, length = math.prod(before[:axis]), before[axis]
    for index in range(len(after)):
        if math.prod(after[:index]) != outer:
            continue
        if after[index] == length and (length > 1 or index == axis):
            return replace(channels, axis=index)
        inner = math.prod(before[axis + 1 :])
        if index == len(after) - 1 and after[index] == length * inner:
            merged = [replace(segment, stride=segment.stride * inner) for segment in channels.segments]
            return Channels(merged, index)
    return None


def _permutation(node: Node, rank: int) -> list[int]:
    """Return the input axis that each output axis is."""
    if node.kind == "Permute":
        return [int(axis) % rank for axis in node.grad_fn._saved_dims]
    order = list(range(rank))
    if rank < 2:
        return order
    swapped = (0, 1) if node.kind == "T" else (node.grad_fn._saved_dim0, node.grad_fn._saved_dim1)
    a, b = map(_signed, swapped)
    order[a], order[b] = order[b], order[a]
    return order


def saved_axes(node: Node, dims: int) -> set[int]:
    """Return the axes that an operation has saved, counted from the front; {1} where it has saved none."""
    saved = getattr(node.grad_fn, "_saved_dim", 1)
    saved = saved if isinstance(saved, list | tuple) else (saved,)
    axes = {_signed(axis) for axis in saved}
    return {axis + dims if axis < 0 else axis for axis in axes} or {1}


def _signed(axis: int) -> int:
    """Autograd saves a negative axis as an unsigned number."""
    return int(axis) - (2**64 if axis >= 2**63 else 0)
