"""Groups: channels that can only be pruned together, their gates, and what a channel costs.

Channels that propagation has found to be identical everywhere form a group. The work is linear in the number of
channels that pass through the operations.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from prunekit.pruning.graph import gate_expr
from prunekit.pruning.graph.axes import CONVS, TRANSPOSED, axis_length, channel_tensors, output_axis
from prunekit.pruning.graph.axis_ops import ACTIVATIONS
from prunekit.pruning.graph.propagation import Propagation, Use, propagate
from prunekit.pruning.graph.trace import LINEAR_OPS, Node, follow_chain, trace
from prunekit.pruning.graph.try_cut import lock_fixed_sizes
from prunekit.pruning.plan import Group, Member
from prunekit.utils.compiled import unwrap


def find_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Find all groups of channels of a model.

    Args:
        model: any module whose input is one tensor; its mode and parameters are left unchanged.
        example: an input batch, (N, C, H, W) or (N, C).

    Returns:
        The groups in order of computation. One that cannot be pruned has a ``reason``.

    Raises:
        PlanError: the model fails on the example.
    """
    model = unwrap(model)
    propagation = propagate(trace(model, example), example.shape[1])
    _lock_shared_weights(model, propagation)
    groups = _build_groups(model, propagation)
    lock_fixed_sizes(model, groups, example)
    return groups


def _lock_shared_weights(model: nn.Module, propagation: Propagation) -> None:
    """Lock the channels of weights that cannot be sliced in place: computed ones and those of several modules."""
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    reasons: dict[str, str | None] = {}
    for use in propagation.uses:
        if use.module not in reasons:
            module, reasons[use.module] = model.get_submodule(use.module), None
            if use.module in propagation.graph.used_elsewhere:
                reasons[use.module] = f"a parameter of {use.module} is used outside of it"
            for name in channel_tensors(module):
                if name not in module._parameters and name not in module._buffers:
                    reasons[use.module] = (
                        f"the {name} of {use.module} is computed from other tensors (a parametrization)"
                    )
                elif owners[id(getattr(module, name))] > 1:
                    reasons[use.module] = f"the {name} of {use.module} is shared with another module"
        reason = reasons[use.module]
        if reason is not None:
            propagation.locked.append((use.ids, reason))


def _build_groups(model: nn.Module, propagation: Propagation) -> list[Group]:
    """Merge identical channels and split all uses where their neighbors differ."""
    pairs = (
        np.concatenate([np.stack(pair) for pair in propagation.same], 1) if propagation.same else np.zeros((2, 0), int)
    )
    matrix = coo_matrix((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), (propagation.total, propagation.total))
    _, label = connected_components(matrix, directed=False)
    # Consecutive channels that appear together in every use are one group.
    starts = np.zeros(label.max(initial=-1) + 2, bool)
    others = [ids for ids, _ in (*propagation.locked, *propagation.counts)]
    for ids in [*(use.ids for use in propagation.uses), *others]:
        labels = label[ids]
        breaks = np.flatnonzero(np.diff(labels) != 1) + 1
        starts[labels[0]] = True
        starts[labels[breaks]] = True
        starts[np.append(labels[breaks - 1], labels[-1]) + 1] = True
    group_of = np.cumsum(starts[:-1]) - 1
    bounds = np.flatnonzero(starts)
    reasons: dict[int, str] = {}
    for ids, reason in propagation.locked:
        for g in np.unique(group_of[label[ids]]):
            reasons.setdefault(int(g), reason)
    uses: dict[int, list[tuple[Use, int]]] = defaultdict(list)
    # In the model's order, so that names and order do not depend on the tracer.
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    for use in sorted(propagation.uses, key=lambda use: (use.reads, order[use.module], use.offset)):
        labels = label[use.ids]
        for start in np.flatnonzero(starts[labels]):
            uses[int(group_of[labels[start]])].append((use, int(start)))
    build = _GroupBuilder(model, propagation)
    groups = [build(uses[g], int(bounds[g + 1] - bounds[g]), reasons.get(g)) for g in uses]
    by_number = dict(zip(uses, groups, strict=True))
    for ids, attribute in propagation.counts:
        for g in np.unique(group_of[label[ids]]).tolist():
            if g in by_number:
                by_number[g].counts.append(attribute)
    return groups + _untraced_groups(model, propagation)


def _untraced_groups(model: nn.Module, propagation: Propagation) -> list[Group]:
    """Return a group that cannot be pruned for each layer that the trace does not contain."""
    traced = {use.module for use in propagation.uses} | propagation.graph.reused
    return [
        Group(
            id=name,
            channels=module.weight.shape[output_axis(module)],
            members=[Member(tensor=f"{name}.weight", axis=output_axis(module))],
            reason="not on the path from input to output (called in train mode only, under no_grad, or never, or its "
            "weight is read by a function)",
        )
        for name, module in model.named_modules()
        if isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)) and name not in traced
    ]


@dataclass
class _ModuleCosts:
    """Costs of a module per entry of axis 0 and of axis 1."""

    params: dict[str, tuple[int, int]]  # trained parameters, for each tensor
    macs: tuple[int, int]  # multiply-adds
    next_norm: str | None  # see ``Member``


class _GroupBuilder:
    """Builds the groups of one model from their uses."""

    def __init__(self, model: nn.Module, propagation: Propagation):
        self.reused = propagation.graph.reused
        self.nodes = propagation.graph.by_name()
        self.calls: dict[str, list[Node]] = defaultdict(list)
        for node in propagation.graph.nodes:
            self.calls[node.name or ""].append(node)
        names = dict.fromkeys(use.module for use in propagation.uses)
        self.costs = {name: self._costs(model.get_submodule(name), self.calls[name]) for name in names}

    def __call__(self, uses: Sequence[tuple[Use, int]], channels: int, reason: str | None) -> Group:
        """Build a group from its uses, each with the index of the group's first channel in it."""
        members: list[Member] = []
        params, macs, exprs = 0, 0, []
        known: dict[tuple[str, int, int], list[Member]] = {}  # those of a module that is called several times
        for use, start in uses:
            costs = self.costs[use.module]
            if use.gate_expr is not None:
                exprs.append(gate_expr.shift(use.gate_expr, start))
            key = use.module, use.axis, use.offset + start * use.stride
            if key in known:
                for member in known[key]:
                    member.pads |= use.pads
                continue
            shared = {"offset": use.offset + start * use.stride, "stride": use.stride, "reads": use.reads}
            shared |= {"next_norm": costs.next_norm if use.reads else None, "pads": use.pads}
            # Output channels take their bias and statistics along.
            for name in list(costs.params)[:1] if use.reads else costs.params:
                axis = use.axis if name == "weight" else 0
                # Not validated: a dense network has thousands, all of them from here.
                members.append(Member.model_construct(tensor=f"{use.module}.{name}", axis=axis, **shared))
                known.setdefault(key, []).append(members[-1])
                params += costs.params[name][axis] * use.stride
            macs += costs.macs[use.axis] * use.stride
        gates, combine = gate_expr.resolve(gate_expr.parallel(exprs) if exprs else gate_expr.UNGATED, channels)
        for gate in gates:
            gate.activation = self._activation(self.nodes[gate.norm])
        if reason is None and not exprs:
            reason = "nothing reads it"
        first = members[0]
        name = "input" if first.reads else first.module
        name = f"{name}@{first.offset}" if first.offset else name
        costs = {"params": params, "macs": macs}
        return Group(id=name, channels=channels, members=members, gates=gates, combine=combine, reason=reason, **costs)

    def _costs(self, module: nn.Module, calls: Sequence[Node]) -> _ModuleCosts:
        positions = sum(map(_positions, calls))
        tensors = channel_tensors(module)
        weight = _numbers_per_entry(module, tensors[0])
        params = {name: _numbers_per_entry(module, name) if name in module._parameters else (0, 0) for name in tensors}
        return _ModuleCosts(params, (positions * weight[0], positions * weight[1]), self._next_norm(calls[0]))

    def _next_norm(self, reader: Node) -> str | None:
        norm = follow_chain(reader, LINEAR_OPS)
        if reader.name in self.reused or (reader.op == "linear" and len(reader.out_shape or ()) != 2):
            return None  # it has several, or one of another axis
        if norm is None or norm.op != "norm" or norm.name in self.reused or norm.module.running_mean is None:
            return None
        return norm.name

    def _activation(self, norm: Node) -> str | None:
        after = follow_chain(norm, ())
        if after is None:
            return None
        name = after.name if after.op == "prelu" else ACTIVATIONS.get(after.kind)
        # A function with the name of a PReLU module could not be told from that module.
        return None if after.op != "prelu" and name in self.nodes else name


def _positions(node: Node) -> int:
    """Return how often a call multiplies with its weight, for one input of the model."""
    # A transposed convolution does once for each input position, the others for each output position.
    shape = node.inputs[0].out_shape if node.op == "transposed" else node.out_shape
    if node.op not in ("conv", "depthwise", "linear", "transposed") or not shape:
        return 0
    return math.prod(shape[1:-1] if node.op == "linear" else shape[2:])


def _numbers_per_entry(module: nn.Module, name: str) -> tuple[int, int]:
    """Return how many numbers of a tensor belong to an entry of axis 0 and of axis 1."""
    tensor = getattr(module, name)
    return tuple(
        tensor.numel() // max(axis_length(module, name, axis), 1) if axis < tensor.dim() else 0 for axis in (0, 1)
    )
