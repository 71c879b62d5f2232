"""Propagation of axes through the record of a model: each axis of each tensor gets its term.

The axes of parameters and buffers begin as independent channels. Rules identify, split and merge them, operation by
operation. An operation without a rule makes the channels that pass through it unprunable, with its name and line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

import prunekit.pruning.graph.rules  # noqa: F401, registers the rules
from prunekit.pruning.graph.axes import CONVS, NORMS, TRANSPOSED, channel_tensors
from prunekit.pruning.graph.axis_terms import Fixed, Leaf, Term, lock, unify
from prunekit.pruning.graph.recorder import Op, Record, Value
from prunekit.pruning.graph.rules.base import CONSTANT, AxisGraph, find_rule, fixed, locked, new_leaves

_MISMATCHED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
INPUT = "the model's input"
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)


def propagate(model: nn.Module, record: Record, train_record: Record | None = None) -> AxisGraph:
    """Give each value of the records its axes.

    Args:
        model: that was recorded.
        record: of the eval mode.
        train_record: of the train mode; layers that only run there keep what they read.
    """
    graph = AxisGraph(model)
    for name, value in record.tensors.items():
        value.axes = _tensor_axes(graph, name, value)
    _lock_computed(model, record)
    for value in record.inputs:
        # Channels are the second axis, or the last of tokens.
        channels = () if value.is_index else (1, 2) if len(value.shape) == 3 else (1,)
        value.axes = [Leaf(side, INPUT) if a in channels else Fixed(side) for a, side in enumerate(value.shape)]
    on_path = path_to_outputs(record)
    graph.on_path = {op for op in record.ops if op in on_path}
    graph.off_path = set(record.ops) - on_path
    _run(graph, record, on_path)
    _tie_attention(model, record)
    for value in record.outputs:
        for term in value.axes:
            lock(term, "the model's output")
    if train_record is not None:
        _run_training(graph, record, train_record)
    return graph


def _run(graph: AxisGraph, record: Record, on_path: set[Op]) -> None:
    for op in record.ops:
        for value in op.inputs:
            if not value.axes and value.shape:
                value.axes = locked(value.shape, CONSTANT)
        found = find_rule(op.name, op.func)
        try:
            axes = found(op, graph) if found else None
        except _MISMATCHED:  # an overload that the rule does not know
            axes = None
        if axes is None or not _fits(op, axes):
            for value in op.inputs:
                graph.lock(op, value.axes)
            reason = f"passes {graph.label(op)}, which is not supported"
            axes = [locked(value.shape, reason) for value in op.outputs]
        for value, own in zip(op.outputs, axes, strict=True):
            value.axes = list(own)
        if op not in on_path:
            _lock_off_path(op)


def _run_training(graph: AxisGraph, record: Record, train: Record) -> None:
    """What only runs in train mode cannot be checked, so it keeps the channels that it reads."""
    for name, value in train.tensors.items():
        value.axes = record.tensors[name].axes
    for value, known in zip(train.inputs, record.inputs, strict=True):
        value.axes = known.axes
    reads, statistics, zeroed = len(graph.reads), len(graph.statistics), len(graph.zeroed)
    evaluated = {op.module for op in graph.on_path}
    graph.off_path |= set(train.ops) - path_to_outputs(train)
    _run(graph, train, {op for op in train.ops if op.module in evaluated})
    del graph.reads[reads:], graph.statistics[statistics:], graph.zeroed[zeroed:]
    for value in train.outputs:
        for term in value.axes:
            lock(term, "the model's output")


def _lock_computed(model: nn.Module, record: Record) -> None:
    """Lock the channels of weights that are computed from other tensors, such as by a parametrization."""
    for name, module in model.named_modules():
        own = (*module._parameters.keys(), *module._buffers.keys())
        computed = [key for key in channel_tensors(module) if key not in own]
        for tensor, value in record.tensors.items() if computed and isinstance(module, (*LAYERS, *NORMS)) else ():
            if tensor.startswith(f"{name}."):
                for term in value.axes:
                    what = f"the {computed[0]} of {name} is computed from other tensors"
                    lock(term, f"{what}; see remove_parametrizations of torch.nn.utils.parametrize")


def _tie_attention(model: nn.Module, record: Record) -> None:
    """PyTorch's attention takes the number of channels in its heads from that of its input, so both lose the same."""
    for name, module in model.named_modules():
        inputs = record.tensors.get(f"{name}.in_proj_weight" if name else "in_proj_weight")
        inner = record.tensors.get(f"{name}.out_proj.weight" if name else "out_proj.weight")
        if isinstance(module, nn.MultiheadAttention) and inputs is not None and inner is not None:
            unify(inputs.axes[1], inner.axes[1], f"{name} (MultiheadAttention)")


def path_to_outputs(record: Record) -> set[Op]:
    """The operations that an output depends on."""
    made_by = {value: op for op in record.ops for value in op.outputs}
    found: set[Op] = set()
    stack = [made_by[value] for value in record.outputs if value in made_by]
    while stack:
        op = stack.pop()
        if op not in found:
            found.add(op)
            stack += [made_by[value] for value in op.inputs if value in made_by]
    return found


def _lock_off_path(op: Op) -> None:
    """A layer that no output depends on keeps what it reads, since no output would show a wrong cut."""
    if any(value.name is not None for value in op.inputs):
        for value in op.inputs:
            for term in value.axes if value.name is None else ():
                lock(term, f"read by {op.module or op.name}, which is not on the path to the output")


def _fits(op: Op, axes: Iterable[Iterable[Term]]) -> bool:
    shapes = [tuple(term.size for term in own) for own in axes]
    return shapes == [value.shape for value in op.outputs]


def _tensor_axes(graph: AxisGraph, name: str, value: Value) -> list[Term]:
    owner, _, key = name.rpartition(".")
    module = graph.modules[owner]
    if key == "weight" and isinstance(module, LAYERS) and len(value.shape) > 1:
        # One channel is a channel, too; positions of the kernel are not.
        return [*map(Leaf, value.shape[:2]), *fixed(value.shape[2:])]
    return [Leaf(side) for side in value.shape] if len(value.shape) == 1 else new_leaves(value.shape)


def consumers(record: Record) -> dict[Value, list[Op]]:
    """The operations that read each value."""
    found: dict[Value, list[Op]] = defaultdict(list)
    for op in record.ops:
        for value in dict.fromkeys(op.inputs):
            found[value].append(op)
    return found
