"""Groups: which channels can only be cut together, which gates decide, and what a channel costs.

One pass over the graph in order of computation carries, for every tensor, the identity of each of its channels. A
convolution makes new ones; a norm, an activation or a depthwise convolution hands them on; a sum makes its inputs'
channels the same; a concatenation puts them side by side. Channels that turn out to be the same everywhere are a
group. The work is linear in the channels that pass each operation.

With the identities goes the *life* of the channels: which gates they have passed, and how those combine (see
``scores``).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from prunekit.pruning.graph import gate_expr
from prunekit.pruning.graph.axes import axis_length, output_axis
from prunekit.pruning.graph.propagation import ACTIVATIONS, Propagation, Use, propagate, tensors
from prunekit.pruning.graph.trace import CONVS, LINEAR_OPS, TRANSPOSED, Graph, Node, follow, trace
from prunekit.pruning.plan import Group, Member


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
    walk = propagate(graph, example.shape[1])
    _lock_computed(model, walk, graph.elsewhere)
    return _assemble(model, graph, walk)


@dataclass
class _Part:
    """What a group needs to know of a module.

    Attributes:
        tensors: for each the name, and how many trained numbers go with an entry of axis 0 and of axis 1.
        into: the norm behind it (see ``Member``).
        macs: multiply-adds that go with an entry of axis 0 and of axis 1.
    """

    tensors: list[tuple[str, tuple[int, int]]]
    into: str | None
    macs: tuple[int, int]


def _parts(model: nn.Module, graph: Graph, walk: Propagation) -> dict[str, _Part]:
    nodes = graph.by_name()
    found = {}
    for name in dict.fromkeys(use.module for use in walk.uses):
        module, node = model.get_submodule(name), nodes[name]
        # A transposed convolution spreads each input element, the others gather for each output element.
        shape = node.in_shape if node.op == "transposed" else node.shape
        counted = node.op in ("conv", "depthwise", "linear", "transposed") and shape
        positions = math.prod(shape[2:]) if counted else 0
        held = tensors(module)
        own = _per_entry(module, held[0])
        found[name] = _Part(
            [(key, _per_entry(module, key) if key in module._parameters else (0, 0)) for key in held],
            _norm_behind(node, graph),
            (positions * own[0], positions * own[1]),
        )
    return found


def _per_entry(module: nn.Module, name: str) -> tuple[int, int]:
    """Numbers that an entry of axis 0, and of axis 1, takes along."""
    tensor = getattr(module, name)
    return tuple(
        tensor.numel() // max(axis_length(module, name, axis), 1) if axis < tensor.dim() else 0 for axis in (0, 1)
    )


def _lock_computed(model: nn.Module, walk: Propagation, elsewhere: set[str]) -> None:
    """Lock the channels of weights that cannot be cut in their place: computed ones, and those of several modules."""
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    reasons: dict[str, str | None] = {}
    for use in walk.uses:
        if use.module not in reasons:
            module, reasons[use.module] = model.get_submodule(use.module), None
            if use.module in elsewhere:
                reasons[use.module] = f"a parameter of {use.module} is used outside of it"
            for name in tensors(module):
                if name not in module._parameters and name not in module._buffers:
                    reasons[use.module] = f"the {name} of {use.module} is computed from others (a parametrization)"
                elif owners[id(getattr(module, name))] > 1:
                    reasons[use.module] = f"the {name} of {use.module} is another module's too"
        reason = reasons[use.module]
        if reason is not None:
            walk.locked.append((use.ids, reason))


def _assemble(model: nn.Module, graph: Graph, walk: Propagation) -> list[Group]:
    """Put the channels that are the same everywhere into groups."""
    parts = _parts(model, graph, walk)
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
    uses: dict[int, list[tuple[Use, int]]] = defaultdict(list)
    # In the model's own order, so that names and order do not depend on how the tracer walked.
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    for use in sorted(walk.uses, key=lambda use: (use.reads, order[use.module], use.offset)):
        span = label[use.ids]
        for at in np.flatnonzero(starts[span]):
            uses[int(group_of[span[at]])].append((use, int(at)))
    nodes = graph.by_name()
    made = [_group(nodes, parts, found, int(first[g + 1] - first[g]), reasons.get(g)) for g, found in uses.items()]
    return made + _unseen(model, walk, graph)


def _unseen(model: nn.Module, walk: Propagation, graph: Graph) -> list[Group]:
    """The layers that no other group names, lest they be passed over in silence."""
    seen = {use.module for use in walk.uses} | graph.reused
    return [
        Group(
            id=name,
            channels=module.weight.shape[output_axis(module)],
            members=[Member(tensor=f"{name}.weight", axis=output_axis(module))],
            reason="not on the way from input to output (it is called in training alone, under no_grad, or never)",
        )
        for name, module in model.named_modules()
        if isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)) and name not in seen
    ]


def _group(
    nodes: dict[str, Node],
    parts: dict[str, _Part],
    found: list[tuple[Use, int]],
    channels: int,
    reason: str | None,
) -> Group:
    members, params, macs, lives = [], 0, 0, []
    for use, at in found:
        part = parts[use.module]
        # Channels that are cut from the output take their bias, their statistics and so on along.
        offset = use.offset + at * use.stride
        for name, size in part.tensors[:1] if use.reads else part.tensors:
            axis = use.axis if name == "weight" else 0
            # Thousands of them in a dense network, and nothing in them from outside: not validated.
            members.append(
                Member.model_construct(
                    tensor=f"{use.module}.{name}",
                    axis=axis,
                    offset=offset,
                    stride=use.stride,
                    reads=use.reads,
                    into=part.into if use.reads else None,
                )
            )
            params += size[axis] * use.stride
        macs += part.macs[use.axis] * use.stride
        if use.gate_expr is not None:
            lives.append(gate_expr.shift(use.gate_expr, at))
    gates, combine = gate_expr.resolve(gate_expr.parallel(lives) if lives else gate_expr.ALIVE, channels)
    for gate in gates:
        gate.activation = _activation(nodes[gate.norm], nodes)
    if reason is None and combine is None:
        reason = "no gate: " + ("nothing reads it" if not lives else "it reaches a reader without passing a norm")
    name = "input" if members[0].reads else members[0].tensor.rpartition(".")[0]
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


def _norm_behind(reader: Node, graph: Graph) -> str | None:
    """The norm that takes what this module puts out, and nothing else, up to sums and up-sampling."""
    norm = follow(reader, LINEAR_OPS)
    if norm is None or norm.op != "norm" or norm.name in graph.reused or norm.module.running_mean is None:
        return None
    return norm.name


def _activation(norm: Node, nodes: dict[str, Node]) -> str | None:
    after = follow(norm, ())
    if after is None:
        return None
    name = after.name if after.op == "prelu" else ACTIVATIONS.get(after.op)
    # A function of which a PReLU has the name could not be told from it.
    return None if after.op != "prelu" and name in nodes else name
