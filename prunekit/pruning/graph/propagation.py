"""Propagation of channels through a graph: the identity and the gate expression of each channel of each tensor.

Of each tensor one axis is followed: the second from a convolution on, the last from a linear layer on. A convolution
produces new channels. Norms, activations and depthwise convolutions pass them on, sums and products identify the
channels of both sides, a concatenation places them side by side, permutations and reshapes move the axis. An operation
that is not known here makes the channels that pass through it unprunable, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from prunekit.pruning.graph.axes import channel_tensors
from prunekit.pruning.graph.axis_ops import Channels, Segment, keep_or_move, saved_axes
from prunekit.pruning.graph.gate_expr import UNGATED, GateExpr, append_gate, forget, parallel, serial
from prunekit.pruning.graph.trace import PRODUCT, SUMS, Graph, Node


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
    counts: list[tuple[np.ndarray, str]] = field(default_factory=list)  # attributes that are numbers of channels
    locked: list[tuple[np.ndarray, str]] = field(default_factory=list)  # identities that cannot be pruned, and why
    # The identities of the entries of each axis of modules that are called more than once, by module and axis.
    shared: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def new_ids(self, count: int) -> np.ndarray:
        self.total += count
        return np.arange(self.total - count, self.total)

    def share(self, node: Node, axis: int, channels: Channels) -> None:
        """What calls of one module read with the same entry of a weight are the same channels."""
        if node.name in self.graph.reused and channels.segments:
            ids = np.concatenate([segment.ids.repeat(segment.stride) for segment in channels.segments])
            self.same.append((self.shared.setdefault((node.name, axis), ids), ids))

    def lock(self, channels: Channels, reason: str) -> None:
        self.locked += [(segment.ids, reason) for segment in channels.segments]

    def new_locked(self, count: int, reason: str) -> Channels:
        channels = Channels([Segment(self.new_ids(count), UNGATED)] if count else [])
        self.lock(channels, reason)
        return channels


def propagate(graph: Graph, in_channels: int) -> Propagation:
    """Propagate channels through a graph whose input has ``in_channels``."""
    forget()
    state = Propagation(graph)
    outputs: dict[int, list[Channels]] = {}  # one for each output, or for all
    for node in graph.nodes:
        pairs = zip(node.inputs, node.parts, strict=True)
        inputs = [outputs[source.index][min(part, len(outputs[source.index]) - 1)] for source, part in pairs]
        several = _split(node, inputs[0], state) if node.kind in ("Split", "Unbind") else []
        channels = several[0] if several else _visit(node, inputs, state, in_channels)
        if node.length(channels.axis) not in (None, channels.entries):
            # An operation that changes the number of channels, such as a mean over them.
            state.lock(channels, f"passes {_label(node)}, which is not supported")
            channels = state.new_locked(node.length(1) or 0, f"produced by {_label(node)}, which is not supported")
            several = []
        outputs[node.index] = several or [channels]
        for channels in outputs[node.index] if node.is_output else ():
            state.lock(channels, "the model's output")
    for name, node in graph.off_path:
        for channels in outputs[node.index]:
            state.lock(channels, f"read by {name}, which is not on the path to the output")
    return state


def _label(node: Node) -> str:
    """Return a module's name and class, or an operation's name."""
    return f"{node.name} ({type(node.module).__name__})" if node.name else node.kind.removeprefix("torch::autograd::")


def _visit(node: Node, inputs: Sequence[Channels], state: Propagation, in_channels: int) -> Channels:
    """Return the channels of a node's output."""
    first = inputs[0] if inputs else Channels([])
    if node.op == "input":
        return state.new_locked(in_channels, "the model's input")
    if node.op in ("conv", "linear", "transposed"):
        return _produce(node, first, state)
    is_plain = first.axis == 1 and all(segment.stride == 1 for segment in first.segments)
    if node.op in ("depthwise", "norm", "prelu") and is_plain:
        return _pass_on(node, first, state)
    if node.op == "prelu" and node.module.num_parameters == 1 < first.entries:
        return first
    if node.mixes_parameter:
        state.lock(first, "combined with a parameter that belongs to no known layer")
        return first
    if any(_differs(shape, node, first.axis) for shape in node.constants):
        state.lock(first, "combined with a tensor that is not a parameter and differs between channels")
        return first
    several = len(inputs) > 1 or node.op == "CatBackward0"
    channels = _combine(node, inputs, state) if several else keep_or_move(node, first)
    if channels is not None:
        return channels
    for channels in inputs:
        state.lock(channels, f"passes {_label(node)}, which is not supported")
    same_shape = bool(node.inputs) and node.out_shape == node.inputs[0].out_shape
    return first if same_shape else Channels(first.segments)


def _differs(shape: tuple[int, ...], node: Node, axis: int) -> bool:
    """Return whether a tensor of this shape, combined with the operation's input, differs along an axis of it."""
    rank = len(node.out_shape or (node.inputs[0].out_shape if node.inputs else None) or shape)
    index = axis - rank + len(shape)
    return 0 <= index < len(shape) and shape[index] != 1


def _combine(node: Node, inputs: Sequence[Channels], state: Propagation) -> Channels | None:
    """Sums, products and concatenations; None where the operation is not known."""
    rank = len(node.out_shape or ())
    # Shapes are aligned at their ends.
    ranks = [len(source.out_shape) if source.out_shape else rank for source in node.inputs]
    axes = {channels.axis - own + rank for channels, own in zip(inputs, ranks, strict=False)}
    if len(axes) != 1 or len(ranks) != len(inputs):
        return None
    (axis,) = axes
    if node.op == "CatBackward0":
        if saved_axes(node, rank) == {axis}:
            return Channels([segment for channels in inputs for segment in channels.segments], axis)
        combined = inputs[0]
        for other in inputs[1:]:
            if not _same_layout(combined, other):
                return None
            combined = _identify(combined, other, state, lambda a, b: parallel([a, b]))
        return replace(combined, axis=axis)
    if len(inputs) != 2 or node.op not in (*SUMS, PRODUCT):
        return None
    if _same_layout(*inputs):
        combine = serial if node.op == PRODUCT else lambda a, b: parallel([a, b])
        return replace(_identify(*inputs, state, combine), axis=axis)
    if node.op == PRODUCT and 1 in (inputs[0].entries, inputs[1].entries):
        # One weight for all channels, such as spatial attention.
        narrow, wide = sorted(inputs, key=lambda channels: channels.entries)
        state.lock(narrow, "scales all channels of another tensor")
        return replace(wide, axis=axis)
    return None


def _split(node: Node, channels: Channels, state: Propagation) -> list[Channels]:
    """The outputs of a chunk; one for all parts where they have all channels, and none where it is not followed.

    Parts of the channels must stay of equal length, so they lose the same ones.
    """
    axis, rank = channels.axis, len(node.inputs[0].out_shape or ())
    if axis >= rank:
        return []
    (along,) = saved_axes(node, rank)
    if node.kind == "Unbind":
        return [replace(channels, axis=axis - (along < axis))] if along not in (0, axis) else []
    if along != axis:
        return [channels]
    size, total = int(node.grad_fn._saved_split_size), channels.entries
    if not node.is_chunk or total % size or any(segment.stride > 1 for segment in channels.segments):
        return []
    parts = []
    for start in range(0, total, size):
        segments, offset = [], 0
        for segment in channels.segments:
            first, last = max(start - offset, 0), min(start + size - offset, len(segment))
            segments += [segment[first:last]] if first < last else []
            offset += len(segment)
        parts.append(Channels(segments, axis))
    ids = [np.concatenate([segment.ids for segment in part.segments]) for part in parts]
    state.same += [(ids[0], other) for other in ids[1:]]
    return parts


def _produce(node: Node, channels: Channels, state: Propagation) -> Channels:
    """A convolution or a linear layer reads the channels of its input and produces new ones."""
    groups = getattr(node.module, "groups", 1)
    transposed = node.op == "transposed"
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    width = node.module.weight.shape[in_axis] * (1 if transposed else groups)
    read_axis, why = _out_axis(node), None
    if channels.axis != read_axis:
        why = f"it computes along axis {read_axis}, and the channels are axis {channels.axis}"
    elif width != channels.entries:
        why = f"it reads {width} channels, not {channels.entries}"
    elif groups > 1 and any(segment.stride > 1 for segment in channels.segments):
        why = "a convolution with groups after a flatten"
    elif groups > 1 and transposed:
        why = f"a transposed convolution with {groups} groups"
    elif 1 < groups == width:
        why = "a depthwise convolution with several outputs per channel"
    if why:
        state.lock(channels, f"read by {node.name}, which is not supported: {why}")
    else:
        state.share(node, in_axis, channels)
        offset = 0
        pads = transposed or (node.op == "conv" and any(getattr(node.grad_fn, "_saved_padding", (1,))))
        for segment in channels.segments:
            state.uses.append(
                Use(node.name, in_axis, offset, segment.ids, segment.stride, segment.gate_expr, pads or segment.padded)
            )
            offset += len(segment) * segment.stride
    ids = state.shared.get((node.name, out_axis))
    outputs = Channels([Segment(state.new_ids(_out_channels(node)) if ids is None else ids, UNGATED)], read_axis)
    state.share(node, out_axis, outputs)
    if why and groups > 1:
        state.lock(outputs, f"produced by {node.name}, {why}")
    state.uses.append(Use(node.name, out_axis, 0, outputs.segments[0].ids))
    return outputs


def _pass_on(node: Node, channels: Channels, state: Propagation) -> Channels:
    """A layer with parameters for each channel passes its channels on."""
    outputs, offset = [], 0
    # A single slope is shared, unless there is a single channel (which may be all that pruning has left).
    shared = node.op == "prelu" and node.module.num_parameters == 1 and channels.entries > 1
    gated = node.op == "norm" and node.module.affine
    if not shared:
        state.share(node, 0, channels)
    for segment in channels.segments:
        if not shared and channel_tensors(node.module):
            state.uses.append(Use(node.name, 0, offset, segment.ids))
        expr = append_gate(segment.gate_expr, node.name, offset) if gated else segment.gate_expr
        outputs.append(replace(segment, gate_expr=expr, shifted=segment.shifted and not gated))
        offset += len(segment)
    if node.op == "norm" and not channel_tensors(node.module):
        state.counts.append(
            (np.concatenate([segment.ids for segment in channels.segments]), f"{node.name}.num_features")
        )
    return Channels(outputs)


def _same_layout(a: Channels, b: Channels) -> bool:
    return a.entries == b.entries and len({segment.stride for segment in (*a.segments, *b.segments)}) == 1


def _identify(
    a: Channels, b: Channels, state: Propagation, combine: Callable[[GateExpr, GateExpr], GateExpr]
) -> Channels:
    """The channels of both sides of a sum or a product are the same from now on."""
    outputs, lengths = [], [[len(segment) for segment in side.segments] for side in (a, b)]
    bounds = sorted({0, *np.cumsum(lengths[0]).tolist(), *np.cumsum(lengths[1]).tolist()})
    for start, stop in pairwise(bounds):
        x, y = _slice(a.segments, start, stop), _slice(b.segments, start, stop)
        if x.ids is not y.ids:
            state.same.append((x.ids, y.ids))
        exprs = x.gate_expr, y.gate_expr
        if combine is serial and x.shifted != y.shifted:
            # The gate of a factor such as sigmoid(bn(x)) does not make the product zero.
            exprs = (UNGATED, y.gate_expr) if x.shifted else (x.gate_expr, UNGATED)
        expr, shifted = combine(*exprs), x.shifted and y.shifted if combine is serial else x.shifted or y.shifted
        outputs.append(Segment(x.ids, expr, x.stride, x.padded or y.padded, shifted))
    return replace(a, segments=outputs)


def _slice(segments: list[Segment], start: int, stop: int) -> Segment:
    """Return [start, stop), which lies within one segment."""
    for segment in segments:
        if start < len(segment):
            return segment[start:stop]
        start, stop = start - len(segment), stop - len(segment)
    raise AssertionError("a slice outside of its tensor")


def _out_channels(node: Node) -> int:
    return getattr(node.module, "out_channels", None) or getattr(node.module, "out_features", None) or 0


def _out_axis(node: Node) -> int:
    """Return the axis of a layer's input and output that it computes along."""
    return len(node.out_shape) - 1 if node.op == "linear" and node.out_shape else 1
