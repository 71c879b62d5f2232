"""Groups: which channels can only be cut together, which gates decide, and what a channel costs.

One pass over the graph in order of computation carries, for every tensor, the identity of each of its channels. A
convolution makes new ones; a norm, an activation or a depthwise convolution hands them on; a sum makes its inputs'
channels the same; a concatenation puts them side by side. Channels that turn out to be the same everywhere are a
group. The work is linear in the channels that pass each operation.

With the identities goes the *life* of the channels: which gates they have passed, and how those combine (see
``scores``).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from prunekit.plan import Group, Member
from prunekit.pruning import life
from prunekit.pruning.graph import SUMS, Graph, Node, follow, trace

# Operations that work on each channel alone and keep their number; anything not known here makes its channels
# uncuttable.
ACTIVATIONS = {
    "ReluBackward0": "relu",
    "LeakyReluBackward0": "leaky_relu",
    "HardtanhBackward0": "relu6",
    "SiluBackward0": "silu",
    "GeluBackward0": "gelu",
    "EluBackward0": "elu",
    "HardswishBackward0": "hardswish",
    "SigmoidBackward0": "sigmoid",
    "TanhBackward0": "tanh",
}
CHANNELWISE = {
    *ACTIVATIONS,
    "MaxPool2DWithIndicesBackward0",
    "AvgPool2DBackward0",
    "AdaptiveAvgPool2DBackward0",
    "MeanBackward1",
    "UpsampleBilinear2DBackward0",
    "UpsampleNearest2DBackward0",
    "UpsampleBicubic2DBackward0",
    "NativeDropoutBackward0",
    "CloneBackward0",
    "ToCopyBackward0",
}
FLATTENS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1"}


@dataclass
class _Segment:
    """Channels of one tensor that have the same past: identities, and the life they have had.

    After a flatten, a channel is ``stride`` entries long.
    """

    ids: np.ndarray
    life: life.Life
    stride: int = 1

    def cut(self, start: int, stop: int) -> _Segment:
        return _Segment(self.ids[start:stop], life.shift(self.life, start), self.stride)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class _Use:
    """An axis of a module's tensors that carries channels, from ``offset`` on; ``life`` where it is an input axis."""

    module: str
    axis: int
    offset: int
    ids: np.ndarray
    stride: int = 1
    life: life.Life | None = None


@dataclass
class _Walk:
    total: int = 0
    same: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    uses: list[_Use] = field(default_factory=list)
    locked: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def new(self, count: int) -> np.ndarray:
        self.total += count
        return np.arange(self.total - count, self.total)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is not b:
            self.same.append((a, b))

    def lock(self, segments: list[_Segment], reason: str) -> None:
        self.locked += [(segment.ids, reason) for segment in segments]


def find_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Every set of channels of ``model`` that can be cut together, in the order of computation.

    Args:
        model: any module whose input is one tensor; its mode and parameters are left as they are.
        example: an input batch, (N, C, H, W) or (N, C).

    Returns:
        The groups. One that cannot be cut has a ``reason``.

    Raises:
        PlanError: the model fails on the example.
    """
    graph = trace(model, example)
    walk = _Walk()
    outputs: dict[int, list[_Segment]] = {}
    for node in graph.nodes:
        made = _visit(node, [outputs[n.index] for n in node.inputs], walk, graph, example)
        if node.width not in (None, sum(len(segment) * segment.stride for segment in made)):
            # An operation that changes the number of channels, such as a mean over them.
            walk.lock(made, f"passes {node.name or _plain(node)}, which is not followed")
            made = _opaque(node.width, f"made by {node.name or _plain(node)}, which is not followed", walk)
        outputs[node.index] = made
        if node.is_output:
            walk.lock(outputs[node.index], "the model's output")
    for node in graph.nodes:
        for late in node.late:
            walk.lock(outputs.get(late.index, []), f"read by {node.name}, which is called more than once")
    _lock_computed(model, walk)
    return _assemble(model, graph, walk)


def _visit(node: Node, inputs: list[list[_Segment]], walk: _Walk, graph: Graph, example: Tensor) -> list[_Segment]:
    """The channels of this node's output."""
    first = inputs[0] if inputs else []
    if node.op == "input":
        ids = walk.new(example.shape[1])
        walk.lock([_Segment(ids, life.ALIVE)], "the model's input")
        return [_Segment(ids, life.ALIVE)]
    if node.name in graph.reused:
        for segments in inputs:
            walk.lock(segments, f"read by {node.name}, which is called more than once")
        reason = f"made by {node.name}, which is called more than once"
        return _opaque(_out_channels(node) or sum(map(len, first)), reason, walk)
    if node.op in ("conv", "linear"):
        return _produce(node, first, walk)
    if node.op in ("depthwise", "norm", "prelu"):
        return _carry(node, first, walk)
    if node.mixes_parameter:
        walk.lock(first, "multiplied or added with a parameter that belongs to no known layer")
        return first
    if node.adds_tensor:
        walk.lock(first, "added to a tensor that is no parameter and has a value for each channel")
        return first
    if node.op in SUMS and len(inputs) == 2 and sum(map(len, inputs[0])) == sum(map(len, inputs[1])):
        return _sum(inputs[0], inputs[1], walk)
    if node.op in SUMS and len(inputs) == 1:
        return first  # a number was added: constants move, but no channel
    if node.op == "CatBackward0" and getattr(node.grad_fn, "_saved_dim", 1) in (1, 2**64 - 3):
        return [segment for segments in inputs for segment in segments]
    if node.op in CHANNELWISE and len(inputs) == 1:
        return first
    if node.op in FLATTENS and node.outputs and all(out.op == "linear" for out in node.outputs):
        return _flatten(node, first)
    for segments in inputs:
        walk.lock(segments, f"passes {_plain(node)}, which is not followed")
    return first


def _plain(node: Node) -> str:
    return node.op.rstrip("0123456789").removesuffix("Backward")


def _lock_computed(model: nn.Module, walk: _Walk) -> None:
    """Lock the channels of weights that cannot be cut in their place: computed ones, and those of several modules."""
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] += 1
    for use in walk.uses:
        module = model.get_submodule(use.module)
        for name in _tensors(module):
            tensor = getattr(module, name)
            if name not in module._parameters and name not in module._buffers:
                walk.locked.append((use.ids, f"the {name} of {use.module} is computed from others (a parametrization)"))
            elif owners[id(tensor)] > 1:
                walk.locked.append((use.ids, f"the {name} of {use.module} is another module's too"))


def _opaque(count: int, reason: str, walk: _Walk) -> list[_Segment]:
    made = [_Segment(walk.new(count), life.ALIVE)]
    walk.lock(made, reason)
    return made


def _produce(node: Node, segments: list[_Segment], walk: _Walk) -> list[_Segment]:
    """A convolution or a linear layer reads its input's channels and makes new ones."""
    groups = getattr(node.module, "groups", 1)
    width = node.module.weight.shape[1] * groups
    given = sum(len(segment) * segment.stride for segment in segments)
    if groups > 1 or width != given:
        why = f"it has {groups} groups" if groups > 1 else f"it reads {width} channels, not {given}"
        walk.lock(segments, f"read by {node.name}, which is not followed: {why}")
    else:
        offset = 0
        for segment in segments:
            walk.uses.append(_Use(node.name, 1, offset, segment.ids, segment.stride, segment.life))
            offset += len(segment) * segment.stride
    made = [_Segment(walk.new(_out_channels(node)), life.ALIVE)]
    if groups > 1:
        walk.lock(made, f"made by {node.name}, a convolution of {groups} groups")
    walk.uses.append(_Use(node.name, 0, 0, made[0].ids))
    return made


def _carry(node: Node, segments: list[_Segment], walk: _Walk) -> list[_Segment]:
    """A layer with parameters for each channel hands its channels on."""
    out, offset = [], 0
    shared = node.op == "prelu" and node.module.num_parameters == 1
    gated = node.op == "norm" and node.module.affine
    for segment in segments:
        if not shared and _tensors(node.module):
            walk.uses.append(_Use(node.name, 0, offset, segment.ids))
        past = life.gated(segment.life, node.name, offset) if gated else segment.life
        out.append(_Segment(segment.ids, past))
        offset += len(segment)
    return out


def _flatten(node: Node, segments: list[_Segment]) -> list[_Segment]:
    """(N, C, …) → (N, C·…): each channel becomes a run of entries."""
    sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    run = int(np.prod(sizes[2:])) if len(sizes) > 2 else 1
    return [_Segment(segment.ids, segment.life, segment.stride * run) for segment in segments]


def _sum(a: list[_Segment], b: list[_Segment], walk: _Walk) -> list[_Segment]:
    """Channels that meet in a sum are the same from now on; they die only if both sides do."""
    out = []
    bounds = sorted({0, *np.cumsum([len(s) for s in a]).tolist(), *np.cumsum([len(s) for s in b]).tolist()})
    for start, stop in pairwise(bounds):
        x, y = _slice(a, start, stop), _slice(b, start, stop)
        walk.tie(x.ids, y.ids)
        out.append(_Segment(x.ids, life.parallel([x.life, y.life])))
    return out


def _slice(segments: list[_Segment], start: int, stop: int) -> _Segment:
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


def _assemble(model: nn.Module, graph: Graph, walk: _Walk) -> list[Group]:
    """Put the channels that are the same everywhere into groups."""
    ties = np.concatenate([np.stack(pair) for pair in walk.same], 1) if walk.same else np.zeros((2, 0), int)
    matrix = coo_matrix((np.ones(ties.shape[1]), (ties[0], ties[1])), (walk.total, walk.total))
    _, label = connected_components(matrix, directed=False)
    # Runs of channels that always appear together, in the same order, are one group: cut every use at the others'
    # bounds.
    starts = np.zeros(label.max(initial=-1) + 2, bool)
    spans = [label[use.ids] for use in walk.uses] + [label[ids] for ids, _ in walk.locked]
    for span in spans:
        starts[span[0]] = True
        breaks = np.flatnonzero(np.diff(span) != 1) + 1
        starts[span[breaks]] = True
        ends = np.append(span[breaks - 1], span[-1]) + 1
        starts[ends] = True
    group_of = np.cumsum(starts[:-1]) - 1
    first = np.flatnonzero(starts)
    reasons: dict[int, str] = {}
    for ids, reason in walk.locked:
        for g in np.unique(group_of[label[ids]]):
            reasons.setdefault(int(g), reason)
    uses: dict[int, list[tuple[_Use, int]]] = defaultdict(list)
    # In the model's own order, so that names and order do not depend on how the tracer walked.
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    for use in sorted(walk.uses, key=lambda use: (use.axis, order[use.module], use.offset)):
        span = label[use.ids]
        for at in np.flatnonzero(starts[span]):
            uses[int(group_of[span[at]])].append((use, int(at)))
    nodes = graph.by_name()
    groups = []
    for g, found in uses.items():
        groups.append(_group(model, nodes, found, int(first[g + 1] - first[g]), reasons.get(g)))
    return groups


def _group(
    model: nn.Module, nodes: dict[str, Node], found: list[tuple[_Use, int]], channels: int, reason: str | None
) -> Group:
    members, params, macs, lives = [], 0, 0, []
    for use, at in found:
        module, node = model.get_submodule(use.module), nodes[use.module]
        # Channels that are cut from the output take their bias, their statistics and so on along.
        for name in ("weight",) if use.axis == 1 else _tensors(module):
            tensor = getattr(module, name)
            offset = use.offset + at * use.stride
            members.append(Member(tensor=f"{use.module}.{name}", axis=use.axis, offset=offset, stride=use.stride))
            if isinstance(tensor, nn.Parameter):
                params += tensor.numel() // tensor.shape[use.axis]
        if node.op in ("conv", "depthwise", "linear") and node.shape:
            positions = int(np.prod(node.shape[2:])) if len(node.shape) > 2 else 1
            macs += positions * (module.weight.numel() // module.weight.shape[use.axis])
        if use.life is not None:
            lives.append(life.shift(use.life, at))
    gates, combine = life.resolve(life.parallel(lives) if lives else life.ALIVE, channels)
    for gate in gates:
        gate.activation = _activation(nodes[gate.norm], nodes)
    if reason is None and combine is None:
        reason = "no gate: " + ("nothing reads it" if not lives else "it reaches a reader without passing a norm")
    name = members[0].tensor.rpartition(".")[0] if members[0].axis == 0 else "input"
    offset = members[0].offset
    return Group(
        id=f"{name}@{offset}" if offset else name,
        channels=channels,
        members=members,
        gates=gates,
        combine=combine,
        params=params,
        macs=macs,
        reason=reason,
    )


def _tensors(module: nn.Module) -> list[str]:
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if isinstance(getattr(module, name, None), Tensor)]


def _activation(norm: Node, nodes: dict[str, Node]) -> str | None:
    after = follow(norm, ())
    if after is None:
        return None
    name = after.name if after.op == "prelu" else ACTIVATIONS.get(after.op)
    # A function of which a PReLU has the name could not be told from it.
    return None if after.op != "prelu" and name in nodes else name
