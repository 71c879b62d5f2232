"""Propagation of channels through a graph: the identity and the gate expression of each channel of each tensor.

A convolution produces new channels. Norms, activations and depthwise convolutions pass them on, sums and products
identify the channels of both sides, a concatenation places them side by side. An operation that is not known here
makes the channels that pass through it unprunable, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from prunekit.pruning.graph.axes import channel_tensors
from prunekit.pruning.graph.gate_expr import UNGATED, GateExpr, append_gate, forget, parallel, serial, shift
from prunekit.pruning.graph.trace import PRODUCT, SUMS, Graph, Node

# Operations on each channel alone that keep the number of channels.
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
CHANNELWISE = {
    *ACTIVATIONS,
    *("Softplus", "Celu", "Threshold", "Hardshrink", "Softshrink", "LogSigmoid", "RreluWithNoise"),
    *("Abs", "Neg", "Exp", "Log", "Sqrt", "Rsqrt", "Reciprocal", "Rsub", "Erf", "Pow", "Clamp", "ClampMin", "ClampMax"),
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"),
    *("AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"),
    *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D"),
    *("UpsampleTrilinear3D", "UpsampleBicubic2D", "NativeDropout", "Expand", "Unsqueeze", "Clone", "ToCopy", "Alias"),
    *(f"{kind}Pad{n}D" for kind in ("Reflection", "Replication") for n in (1, 2, 3)),
}
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

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Segment:
        return replace(self, ids=self.ids[part], gate_expr=shift(self.gate_expr, part.start))


Channels = list[Segment]


@dataclass
class Use:
    """An axis of a module's weight that carries channels, from ``offset`` on."""

    module: str
    axis: int
    offset: int
    ids: np.ndarray  # identities of the channels, (channels,)
    stride: int = 1  # entries per channel
    gate_expr: GateExpr | None = None  # the gates passed by channels that the module reads; None for its outputs
    pads: bool = False  # whether what it reads is padded, before or by the module

    @property
    def reads(self) -> bool:
        return self.gate_expr is not None


@dataclass
class Propagation:
    """The channels of a graph; each has an identity, an index below ``total``."""

    graph: Graph
    total: int = 0
    same: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # identities that are one channel
    uses: list[Use] = field(default_factory=list)
    locked: list[tuple[np.ndarray, str]] = field(default_factory=list)  # identities that cannot be pruned, and why

    def new_ids(self, count: int) -> np.ndarray:
        self.total += count
        return np.arange(self.total - count, self.total)

    def lock(self, segments: Channels, reason: str) -> None:
        self.locked += [(segment.ids, reason) for segment in segments]

    def new_locked(self, count: int, reason: str) -> Channels:
        segments = [Segment(self.new_ids(count), UNGATED)]
        self.lock(segments, reason)
        return segments


def entries(segments: Channels) -> int:
    """Return the length of the axis that carries these channels."""
    return sum(len(segment) * segment.stride for segment in segments)


def propagate(graph: Graph, in_channels: int) -> Propagation:
    """Propagate channels through a graph whose input has ``in_channels``."""
    forget()
    state = Propagation(graph)
    outputs: dict[int, Channels] = {}
    for node in graph.nodes:
        segments = _visit(node, [outputs[n.index] for n in node.inputs], state, in_channels)
        if node.width not in (None, entries(segments)):
            # An operation that changes the number of channels, such as a mean over them.
            state.lock(segments, f"passes {_label(node)}, which is not supported")
            segments = state.new_locked(node.width, f"produced by {_label(node)}, which is not supported")
        outputs[node.index] = segments
        if node.is_output:
            state.lock(segments, "the model's output")
    for name, node in graph.off_path:
        state.lock(outputs[node.index], f"read by {name}, which is not on the path to the output")
    return state


def _label(node: Node) -> str:
    """Return a module's name and class, or an operation's name."""
    return f"{node.name} ({type(node.module).__name__})" if node.name else node.kind.removeprefix("torch::autograd::")


def _visit(node: Node, inputs: Sequence[Channels], state: Propagation, in_channels: int) -> Channels:
    """Return the channels of a node's output."""
    first = inputs[0] if inputs else []
    if node.op == "input":
        return state.new_locked(in_channels, "the model's input")
    if node.name in state.graph.reused:
        for segments in inputs:
            state.lock(segments, f"read by {node.name}, which is called more than once")
        width = _out_channels(node) or sum(map(len, first))
        return state.new_locked(width, f"produced by {node.name}, which is called more than once")
    if node.op in ("conv", "linear", "transposed"):
        return _produce(node, first, state)
    if node.op in ("depthwise", "norm", "prelu") and all(segment.stride == 1 for segment in first):
        return _pass_on(node, first, state)
    if node.mixes_parameter:
        state.lock(first, "combined with a parameter that belongs to no known layer")
        return first
    if node.mixes_tensor:
        state.lock(first, "combined with a tensor that is not a parameter and differs between channels")
        return first
    if node.op in (*SUMS, PRODUCT, "DivBackward0"):
        if len(inputs) == 1:
            return first  # with a number
        if len(inputs) == 2 and node.op != "DivBackward0" and _same_layout(*inputs):
            return _identify(*inputs, state, serial if node.op == PRODUCT else lambda a, b: parallel([a, b]))
    if node.op == PRODUCT and len(inputs) == 2 and 1 in map(entries, inputs):
        # One weight for all channels, such as spatial attention.
        narrow, wide = sorted(inputs, key=entries)
        state.lock(narrow, "scales all channels of another tensor")
        return wide
    if node.op == "CatBackward0" and _saved_axes(node, len(node.out_shape or ())) == {1}:
        return [segment for segments in inputs for segment in segments]
    if _keeps_channels(node, inputs):
        return [replace(segment, padded=True) for segment in first] if _pads(node) else first
    if node.kind in RESHAPES:
        reshaped = _reshape(node, first)
        if reshaped is not None:
            return reshaped
    for segments in inputs:
        state.lock(segments, f"passes {_label(node)}, which is not supported")
    return first


def _keeps_channels(node: Node, inputs: Sequence[Channels]) -> bool:
    """Return whether an operation works on each channel of one input alone."""
    if node.kind in CHANNELWISE:
        return len(inputs) == 1
    if node.op in REDUCTIONS:
        return bool(inputs) and not {0, 1} & _saved_axes(node, len(node.inputs[0].out_shape or ()))
    if node.op == "SliceBackward0":
        return getattr(node.grad_fn, "_saved_dim", 1) in (0, *range(2, 8))
    if node.op == "ConstantPadNdBackward0" and node.out_shape:
        return len(node.grad_fn._saved_pad) <= 2 * (len(node.out_shape) - 2)
    return False


def _pads(node: Node) -> bool:
    """Return whether an operation fills positions at the border, whatever the amount at this size."""
    if node.kind.startswith("AvgPool"):
        return node.grad_fn._saved_count_include_pad and any(node.grad_fn._saved_padding)
    return node.kind == "ConstantPadNd"


def _produce(node: Node, segments: Channels, state: Propagation) -> Channels:
    """A convolution or a linear layer reads the channels of its input and produces new ones."""
    groups = getattr(node.module, "groups", 1)
    transposed = node.op == "transposed"
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    width = node.module.weight.shape[in_axis] * (1 if transposed else groups)
    why = None
    if width != entries(segments):
        why = f"it reads {width} channels, not {entries(segments)}"
    elif node.op == "linear" and len(node.out_shape or ()) > 2:
        why = "it reads the last of more than two axes"
    elif groups > 1 and transposed:
        why = f"a transposed convolution with {groups} groups"
    elif 1 < groups == width:
        why = "a depthwise convolution with several outputs per channel"
    if why:
        state.lock(segments, f"read by {node.name}, which is not supported: {why}")
    else:
        offset = 0
        pads = transposed or (node.op == "conv" and any(getattr(node.grad_fn, "_saved_padding", (1,))))
        for segment in segments:
            state.uses.append(
                Use(node.name, in_axis, offset, segment.ids, segment.stride, segment.gate_expr, pads or segment.padded)
            )
            offset += len(segment) * segment.stride
    outputs = [Segment(state.new_ids(_out_channels(node)), UNGATED)]
    if why and (groups > 1 or node.op == "linear"):
        state.lock(outputs, f"produced by {node.name}, {why}")
    state.uses.append(Use(node.name, out_axis, 0, outputs[0].ids))
    return outputs


def _pass_on(node: Node, segments: Channels, state: Propagation) -> Channels:
    """A layer with parameters for each channel passes its channels on."""
    outputs, offset = [], 0
    # A single slope is shared, unless there is a single channel (which may be all that pruning has left).
    shared = node.op == "prelu" and node.module.num_parameters == 1 and entries(segments) > 1
    gated = node.op == "norm" and node.module.affine
    for segment in segments:
        if not shared and channel_tensors(node.module):
            state.uses.append(Use(node.name, 0, offset, segment.ids))
        expr = append_gate(segment.gate_expr, node.name, offset) if gated else segment.gate_expr
        outputs.append(replace(segment, gate_expr=expr))
        offset += len(segment)
    return outputs


def _reshape(node: Node, segments: Channels) -> Channels | None:
    """A view keeps the channels, or flattens (N, C, …) to (N, C·…), where each channel has several entries."""
    before = tuple(int(side) for side in getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    after = node.out_shape
    if not before or not after or len(before) < 2 or len(after) < 2 or before[0] != after[0]:
        return None
    if before[1] == after[1]:
        return segments
    run = int(np.prod(before[2:]))
    if len(after) == 2 and after[1] == before[1] * run:
        return [replace(segment, stride=segment.stride * run) for segment in segments]
    return None


def _saved_axes(node: Node, dims: int) -> set[int]:
    """Return the axes that an operation has saved, counted from the front; {1} where it has saved none."""
    saved = getattr(node.grad_fn, "_saved_dim", 1)
    saved = saved if isinstance(saved, list | tuple) else (saved,)
    # Autograd saves a negative axis as an unsigned number.
    axes = {int(axis) - (2**64 if axis >= 2**63 else 0) for axis in saved}
    return {axis + dims if axis < 0 else axis for axis in axes} or {1}


def _same_layout(a: Channels, b: Channels) -> bool:
    return entries(a) == entries(b) and len({segment.stride for segment in (*a, *b)}) == 1


def _identify(
    a: Channels, b: Channels, state: Propagation, combine: Callable[[GateExpr, GateExpr], GateExpr]
) -> Channels:
    """The channels of both sides of a sum or a product are the same from now on."""
    outputs = []
    bounds = sorted({0, *np.cumsum([len(s) for s in a]).tolist(), *np.cumsum([len(s) for s in b]).tolist()})
    for start, stop in pairwise(bounds):
        x, y = _slice(a, start, stop), _slice(b, start, stop)
        if x.ids is not y.ids:
            state.same.append((x.ids, y.ids))
        outputs.append(Segment(x.ids, combine(x.gate_expr, y.gate_expr), x.stride, x.padded or y.padded))
    return outputs


def _slice(segments: Channels, start: int, stop: int) -> Segment:
    """Return [start, stop), which lies within one segment."""
    for segment in segments:
        if start < len(segment):
            return segment[start:stop]
        start, stop = start - len(segment), stop - len(segment)
    raise AssertionError("a slice outside of its tensor")


def _out_channels(node: Node) -> int:
    return getattr(node.module, "out_channels", None) or getattr(node.module, "out_features", None) or 0
