"""How channels pass through operations: for every tensor of a model, who each of its channels is.

A *segment* is a run of channels with the same past: their identities, and the *life* they have had (see ``life``). A
convolution makes new channels; a norm, an activation or a depthwise convolution hands them on; in a sum or a product
the channels of both sides become the same; a concatenation puts them side by side. Whatever is not known here makes
the channels that pass it uncuttable, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

from prunekit.pruning.graph import gate_expr
from prunekit.pruning.graph.trace import PRODUCT, SUMS, Graph, Node

# Operations that work on each channel alone and keep their number.
ACTIVATIONS = {
    "ReluBackward0": "relu",
    "LeakyReluBackward0": "leaky_relu",
    "HardtanhBackward0": "relu6",
    "SiluBackward0": "silu",
    "GeluBackward0": "gelu",
    "EluBackward0": "elu",
    "HardswishBackward0": "hardswish",
    "SigmoidBackward0": "sigmoid",
    "HardsigmoidBackward0": "hardsigmoid",
    "TanhBackward0": "tanh",
    "MishBackward0": "mish",
}
CHANNELWISE = {
    *ACTIVATIONS,
    *(f"{name}Backward0" for name in ("Softplus", "Celu", "Threshold", "Hardshrink", "Softshrink", "LogSigmoid")),
    *(f"{name}Backward0" for name in ("Abs", "Neg", "Exp", "Log", "Sqrt", "Pow", "Clamp", "ClampMin", "ClampMax")),
    *("ClampBackward1", "PowBackward1"),
    *("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0", "AdaptiveMaxPool2DBackward0"),
    *("AvgPool2DBackward0", "AvgPool3DBackward0", "AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0"),
    *("UpsampleNearest1DBackward0", "UpsampleNearest2DBackward0", "UpsampleNearest3DBackward0"),
    *("UpsampleLinear1DBackward0", "UpsampleBilinear2DBackward0", "UpsampleTrilinear3DBackward0"),
    *("UpsampleBicubic2DBackward0", "NativeDropoutBackward0", "ExpandBackward0", "UnsqueezeBackward0"),
    *(f"{kind}Pad{n}DBackward0" for kind in ("Reflection", "Replication") for n in (1, 2, 3)),
    *("CloneBackward0", "ToCopyBackward0"),
}
# Sums over some axes, which may be places or channels.
OVER_AXES = {"MeanBackward1", "SumBackward1", "AmaxBackward0", "AminBackward0"}
RESHAPES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1"}
RESHAPES |= {"SqueezeBackward2"}


@dataclass
class Segment:
    """Channels of one tensor that have the same past: identities, and the life they have had.

    After a flatten, a channel is ``stride`` entries long.
    """

    ids: np.ndarray
    gate_expr: gate_expr.GateExpr
    stride: int = 1

    def cut(self, start: int, stop: int) -> Segment:
        return Segment(self.ids[start:stop], gate_expr.shift(self.gate_expr, start), self.stride)

    def __len__(self) -> int:
        return len(self.ids)


Channels = list[Segment]


@dataclass
class Use:
    """An axis of a module's tensors that carries channels, from ``offset`` on; ``life`` where it takes them in."""

    module: str
    axis: int
    offset: int
    ids: np.ndarray
    stride: int = 1
    gate_expr: gate_expr.GateExpr | None = None

    @property
    def reads(self) -> bool:
        return self.gate_expr is not None


@dataclass
class Propagation:
    """What is found out on the way through a graph.

    Attributes:
        total: how many identities there are.
        same: pairs of identities that are one channel.
        uses: where channels stand in tensors.
        locked: identities that cannot be cut, and why.
    """

    total: int = 0
    same: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    locked: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def new(self, count: int) -> np.ndarray:
        self.total += count
        return np.arange(self.total - count, self.total)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is not b:
            self.same.append((a, b))

    def lock(self, segments: Channels, reason: str) -> None:
        self.locked += [(segment.ids, reason) for segment in segments]

    def opaque(self, count: int, reason: str) -> Channels:
        """New channels that cannot be cut."""
        made = [Segment(self.new(count), gate_expr.ALIVE)]
        self.lock(made, reason)
        return made


def entries(segments: Channels) -> int:
    """How long the axis is on which these channels stand."""
    return sum(len(segment) * segment.stride for segment in segments)


def propagate(graph: Graph, inputs: int) -> Propagation:
    """Follow the channels through a graph, whose input has ``inputs`` of them."""
    walk = Propagation()
    outputs: dict[int, Channels] = {}
    for node in graph.nodes:
        given = [outputs[n.index] for n in node.inputs]
        made = _visit(node, given, walk, graph, inputs)
        if node.width not in (None, entries(made)):
            # An operation that changes the number of channels, such as a mean over them.
            walk.lock(made, f"passes {node.name or plain(node)}, which is not followed")
            made = walk.opaque(node.width, f"made by {node.name or plain(node)}, which is not followed")
        outputs[node.index] = made
        if node.is_output:
            walk.lock(made, "the model's output")
    for name, node in graph.aside:
        walk.lock(outputs[node.index], f"read by {name}, which is not on the way to the output")
    for node in graph.nodes:
        for late in node.late:
            walk.lock(outputs.get(late.index, []), f"read by {node.name}, which is called more than once")
    return walk


def plain(node: Node) -> str:
    """An operation's name without autograd's additions."""
    return node.op.rstrip("0123456789").removesuffix("Backward")


def _visit(node: Node, given: Sequence[Channels], walk: Propagation, graph: Graph, inputs: int) -> Channels:
    """The channels of this node's output."""
    first = given[0] if given else []
    if node.op == "input":
        return walk.opaque(inputs, "the model's input")
    if node.name in graph.reused:
        for segments in given:
            walk.lock(segments, f"read by {node.name}, which is called more than once")
        return walk.opaque(
            _out_channels(node) or sum(map(len, first)), f"made by {node.name}, which is called more than once"
        )
    if node.op in ("conv", "linear", "transposed"):
        return _produce(node, first, walk)
    if node.op in ("depthwise", "norm", "prelu") and all(segment.stride == 1 for segment in first):
        return _carry(node, first, walk)
    if node.mixes_parameter:
        walk.lock(first, "multiplied or added with a parameter that belongs to no known layer")
        return first
    if node.mixes_tensor:
        walk.lock(first, "added to or multiplied with a tensor that is no parameter and has a value for each channel")
        return first
    if node.op in (*SUMS, PRODUCT, "DivBackward0"):
        if len(given) == 1:
            return first  # with a number: constants move, but no channel
        if len(given) == 2 and node.op != "DivBackward0" and _alike(*given):
            return _meet(given[0], given[1], walk, gate_expr.product if node.op == PRODUCT else _side_by_side)
    if node.op == PRODUCT and len(given) == 2 and 1 in map(entries, given):
        # A map of weights for all channels alike, such as spatial attention.
        narrow, wide = sorted(given, key=entries)
        walk.lock(narrow, "weighs all channels of another tensor")
        return wide
    if node.op == "CatBackward0" and _axes(node, "_saved_dim", len(node.made or ())) == {1}:
        return [segment for segments in given for segment in segments]
    if node.op in CHANNELWISE and len(given) == 1:
        return first
    if node.op in OVER_AXES and node.inputs and not {0, 1} & _axes(node, "_saved_dim", len(node.inputs[0].made or ())):
        return first
    if node.op == "SliceBackward0" and getattr(node.grad_fn, "_saved_dim", 1) in (0, *range(2, 8)):
        return first  # of rows or columns
    if node.op == "ConstantPadNdBackward0" and node.made and len(node.grad_fn._saved_pad) <= 2 * (len(node.made) - 2):
        return first  # of rows or columns
    if node.op in RESHAPES:
        shaped = _reshape(node, first)
        if shaped is not None:
            return shaped
    for segments in given:
        walk.lock(segments, f"passes {node.name or plain(node)}, which is not followed")
    return first


def _produce(node: Node, segments: Channels, walk: Propagation) -> Channels:
    """A convolution or a linear layer reads its input's channels and makes new ones."""
    module = node.module
    groups = getattr(module, "groups", 1)
    turned = node.op == "transposed"
    out_axis, in_axis = (1, 0) if turned else (0, 1)
    width = module.weight.shape[in_axis] * (1 if turned else groups)
    given = entries(segments)
    why = None
    if width != given:
        why = f"it reads {width} channels, not {given}"
    elif groups > 1 and turned:
        why = f"a transposed convolution of {groups} groups"
    elif 1 < groups == width:
        why = "a depthwise convolution that makes several channels of each"
    if why:
        walk.lock(segments, f"read by {node.name}, which is not followed: {why}")
    else:
        offset = 0
        for segment in segments:
            walk.uses.append(Use(node.name, in_axis, offset, segment.ids, segment.stride, segment.gate_expr))
            offset += len(segment) * segment.stride
    made = [Segment(walk.new(_out_channels(node)), gate_expr.ALIVE)]
    if why and groups > 1:
        walk.lock(made, f"made by {node.name}, {why}")
    walk.uses.append(Use(node.name, out_axis, 0, made[0].ids))
    return made


def _carry(node: Node, segments: Channels, walk: Propagation) -> Channels:
    """A layer with parameters for each channel hands its channels on."""
    out, offset = [], 0
    # Of a single channel it is that channel's own, as it is where others have been cut beside it.
    shared = node.op == "prelu" and node.module.num_parameters == 1 and entries(segments) > 1
    gated = node.op == "norm" and node.module.affine
    for segment in segments:
        if not shared and tensors(node.module):
            walk.uses.append(Use(node.name, 0, offset, segment.ids))
        past = gate_expr.append_gate(segment.gate_expr, node.name, offset) if gated else segment.gate_expr
        out.append(Segment(segment.ids, past))
        offset += len(segment)
    return out


def _reshape(node: Node, segments: Channels) -> Channels | None:
    """What becomes of channels in a view: they stay, or (N, C, …) → (N, C·…) makes each of them a run of entries."""
    before = tuple(int(side) for side in getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    after = node.made
    if not before or not after or len(before) < 2 or len(after) < 2 or before[0] != after[0]:
        return None
    if before[1] == after[1]:
        return segments
    run = int(np.prod(before[2:]))
    if len(after) == 2 and after[1] == before[1] * run:
        return [Segment(segment.ids, segment.gate_expr, segment.stride * run) for segment in segments]
    return None


def _axes(node: Node, name: str, dims: int) -> set[int]:
    """The axes that an operation has noted, counted from the front; {1} where it has noted none."""
    noted = getattr(node.grad_fn, name, 1)
    noted = noted if isinstance(noted, list | tuple) else (noted,)
    # Autograd keeps a negative axis as a number without sign.
    axes = {int(axis) - (2**64 if axis >= 2**63 else 0) for axis in noted}
    return {axis + dims if axis < 0 else axis for axis in axes} or {1}


def _alike(a: Channels, b: Channels) -> bool:
    """Whether two tensors have the same number of channels, each as many entries long."""
    return entries(a) == entries(b) and len({segment.stride for segment in (*a, *b)}) == 1


def _side_by_side(a: gate_expr.GateExpr, b: gate_expr.GateExpr) -> gate_expr.GateExpr:
    return gate_expr.parallel([a, b])


def _meet(a: Channels, b: Channels, walk: Propagation, combined) -> Channels:
    """Channels that meet in a sum or a product are the same from now on."""
    out = []
    bounds = sorted({0, *np.cumsum([len(s) for s in a]).tolist(), *np.cumsum([len(s) for s in b]).tolist()})
    for start, stop in pairwise(bounds):
        x, y = _slice(a, start, stop), _slice(b, start, stop)
        walk.tie(x.ids, y.ids)
        out.append(Segment(x.ids, combined(x.gate_expr, y.gate_expr), x.stride))
    return out


def _slice(segments: Channels, start: int, stop: int) -> Segment:
    """The part of one segment that covers [start, stop)."""
    at = 0
    for segment in segments:
        if start < at + len(segment):
            return segment.cut(start - at, stop - at)
        at += len(segment)
    raise AssertionError("a slice outside of its tensor")


def _out_channels(node: Node) -> int:
    module = node.module
    return getattr(module, "out_channels", None) or getattr(module, "out_features", None) or 0


def tensors(module: nn.Module) -> list[str]:
    """The tensors of a module that have an entry for each channel that it makes or hands on."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if isinstance(getattr(module, name, None), Tensor)]
