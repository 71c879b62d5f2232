"""Groups: channels that can only be pruned together, their gates, and what a channel costs.

Each leaf of the axes of parameters and buffers is a group, unless something forbids it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from prunekit.pruning.graph import gate_expr
from prunekit.pruning.graph.axes import CONVS, NORMS, TRANSPOSED, axis_length, output_axis
from prunekit.pruning.graph.axis_terms import Leaf, Term, leaves, lock, spans, unify
from prunekit.pruning.graph.gate_expr import GateExpr
from prunekit.pruning.graph.products import products_of
from prunekit.pruning.graph.propagation import INPUT, LAYERS, consumers, propagate
from prunekit.pruning.graph.recorder import Op, Record, Value
from prunekit.pruning.graph.rules.base import SOFTMAX, AxisGraph, Read
from prunekit.pruning.graph.trace import record_call, trace
from prunekit.pruning.graph.try_cut import FixedSizes
from prunekit.pruning.graph.zero_states import ZeroStates
from prunekit.pruning.plan import Attribute, Group, Member, Product, Statistic
from prunekit.utils.compiled import unwrap
from prunekit.utils.inputs import Example

ACTIVATIONS = {
    **{name: name for name in ("relu", "leaky_relu", "silu", "gelu", "elu", "hardswish", "sigmoid", "tanh", "mish")},
    **{"hardtanh": "relu6", "hardsigmoid": "hardsigmoid", "relu6": "relu6"},
}
# Linear operations that keep a constant channel constant: a shift before them can be moved to a norm after them.
LINEAR_OPS = ("add", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d")


def find_groups(model: nn.Module, example: Example) -> list[Group]:
    """Find all groups of channels of a model.

    Args:
        model: any module; its mode and parameters are left unchanged.
        example: a batch of inputs: a tensor, such as images, (N, C, H, W), or tokens, (N, L); a tuple of the model's
            arguments; or a dict of its keyword arguments.

    Returns:
        The groups in order of computation. One that cannot be pruned has a ``reason``.

    Raises:
        PlanError: the model fails on the example.
    """
    model = unwrap(model)
    gate_expr.clear_expressions()
    found = trace(model, example)
    graph = propagate(found.model, found.record, found.train_record)
    sizes = FixedSizes(found.model, found.record, lambda cut: record_call(cut.eval(), found.example))
    attributes: dict[Leaf, list[Attribute]] = {}
    while True:
        builder = _GroupBuilder(model, found.record, graph)
        groups = builder.build()
        for leaf, group in groups.items():
            group.attributes = attributes.get(leaf, group.attributes)
        ties = sizes.lock(groups)
        if not ties:
            return [*groups.values(), *builder.untraced_groups()]
        attributes = {leaf: group.attributes for leaf, group in groups.items()}
        for a, b in ties:
            unify(a, b, "a number that is the length of both")


@dataclass
class _Channels:
    """What is known of one leaf."""

    leaf: Leaf
    members: list[Member] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    macs: int = 0
    exprs: list[GateExpr] = field(default_factory=list)
    zeroed: bool = False
    shifted: str | None = None  # a layer that reads what is not zero where the channel is
    attributes: list[Attribute] = field(default_factory=list)


class _GroupBuilder:
    """Builds the groups of one model."""

    def __init__(self, model: nn.Module, record: Record, graph: AxisGraph):
        self.model, self.record, self.graph = model, record, graph
        self.consumers = consumers(record)
        self.modules = dict(model.named_modules())
        self.order = {name: index for index, name in enumerate(self.modules)}
        self.outputs = set(record.outputs)
        gates = {
            value: name.rpartition(".")[0]
            for name, value in record.tensors.items()
            if name.endswith(".weight") and isinstance(self.modules[name.rpartition(".")[0]], NORMS)
        }
        self.norm_ops = {
            gates[op.args[1]]: op
            for op in record.ops
            if op.name in ("batch_norm", "instance_norm") and op.args[1] in gates
        }
        contractions = {read.op for read in graph.reads} | {op for op, _ in graph.zeroed}
        self.states = ZeroStates(record, dict(model.named_parameters()), gates, contractions)
        self.reads: dict[tuple[Value, int], list[Read]] = defaultdict(list)
        for read in graph.reads:
            self.reads[read.tensor, read.axis].append(read)
        self.used = {value for op in graph.on_path for value in op.inputs if value.name is not None}
        self.grouped = {name for name, _ in graph.virtual}
        self.channels: dict[Leaf, _Channels] = {}

    def build(self) -> dict[Leaf, Group]:
        for name, value in self.record.tensors.items():
            if value in self.used:
                self._add_members(name, value)
        self._add_reads()
        self._add_zeroed()
        self._add_statistics()
        self._add_products()
        for name, term in self.graph.counts:
            module, _, key = name.rpartition(".")
            for span in spans(term):
                attribute = Attribute(module=module, name=key, size=term.size, lost=span.stride)
                self._of(span.leaf).attributes.append(attribute)
        for channels in self.channels.values():
            if channels.zeroed and channels.shifted:
                lock(channels.leaf, f"read by {channels.shifted}, where a channel without weights is not zero")
        found = [channels for channels in self.channels.values() if channels.members]
        for channels in found:
            channels.members.sort(key=self._member_order)
        found.sort(key=lambda channels: self._member_order(channels.members[0]))
        names: Counter[str] = Counter()
        return {channels.leaf: self._group(channels, names) for channels in found}

    def _axis(self, name: str, value: Value, axis: int) -> Term:
        return self.graph.virtual.get((name, axis), value.axes[axis])

    def _of(self, leaf: Leaf) -> _Channels:
        return self.channels.setdefault(leaf, _Channels(leaf))

    def _add_members(self, name: str, value: Value) -> None:
        for axis in range(len(value.axes)):
            reads = self.reads.get((value, axis), [])
            # An embedding that is tied to the last layer makes what that layer reads.
            is_read = bool(reads) and {read.op for read in reads} >= set(self.consumers[value]) & self.graph.on_path
            for span in spans(self._axis(name, value, axis)):
                channels = self._of(span.leaf)
                channels.zeroed |= bool(reads) and not is_read
                layout = {"offset": span.offset, "stride": span.stride, "repeats": span.repeats}
                if name in self.grouped and (span.stride > 1 or span.repeats) and axis < 2:
                    lock(span.leaf, f"regrouped between convolutions with groups ({name.rpartition('.')[0]})")
                # Not validated: a dense network has thousands, all of them from here.
                member = Member.model_construct(tensor=name, axis=axis, reads=is_read, **layout)
                channels.members.append(member)

    def _add_reads(self) -> None:
        for read in self.graph.reads:
            if read.op not in self.graph.on_path:
                continue
            name = read.tensor.name or ""
            module = self.modules[name.rpartition(".")[0]]
            is_layer = isinstance(module, LAYERS) and read.op.module == name.rpartition(".")[0]
            own = list(spans(self._axis(name, read.tensor, read.axis)))
            states = self.states.of(read.value, read.value_axis)
            if [span.leaf for span in own] != [
                span.leaf for span in self.states.spans(read.value.axes[read.value_axis])
            ]:
                for span in own:
                    lock(span.leaf, f"regrouped by {self.graph.label(read.op)}")
                continue
            pads = self._pads(read.op)
            next_norm = self._next_norm(read.op)
            for span, state in zip(own, states, strict=True):
                channels = self._of(span.leaf)
                channels.exprs.append(state.gate_expr)
                if state.shifted:
                    channels.shifted = self.graph.label(read.op)
                if not is_layer or span.repeats:
                    self._require_zero(channels, read.op, [state])
                for member in channels.members:
                    if member.tensor == name and member.axis == read.axis and member.offset == span.offset:
                        member.pads |= pads or state.padded
                        member.next_norm = next_norm

    def _add_zeroed(self) -> None:
        for op, sides in self.graph.zeroed:
            if op not in self.graph.on_path:
                continue
            rows = [list(self.states.spans(value.axes[axis])) for value, axis in sides]
            states = [self.states.of(value, axis) for value, axis in sides]
            if any([s.leaf for s in row] != [s.leaf for s in rows[0]] for row in rows):
                for row in rows:
                    for span in row:
                        lock(span.leaf, f"regrouped by {self.graph.label(op)}")
                continue
            for number, span in enumerate(rows[0]):
                self._require_zero(self._of(span.leaf), op, [own[number] for own in states])

    def _require_zero(self, channels: _Channels, op: Op, states: Sequence) -> None:
        channels.zeroed = True
        if all(state.shifted for state in states):
            lock(channels.leaf, f"read by {self.graph.label(op)}, where a channel without weights is not zero")

    def _add_statistics(self) -> None:
        for statistic in self.graph.statistics:
            op, own = statistic.op, set(leaves(statistic.term))
            # The rows of a softmax over the same channels, as of an attention between channels, are left out, too.
            others = enumerate(op.args[0].axes) if op.name in SOFTMAX else ()
            rows = [(axis, term) for axis, term in others if axis != statistic.axis]
            for axis, term in ((statistic.axis, statistic.term), *rows):
                for span in spans(term):
                    layout = {"axis": axis, "offset": span.offset, "stride": span.stride, "repeats": span.repeats}
                    if span.leaf in own:
                        self._of(span.leaf).statistics.append(
                            Statistic(module=op.module, operation=op.name, call=op.number, **layout)
                        )

    def _add_products(self) -> None:
        images = self.record.inputs[0].shape[0]
        for op in self.record.ops:
            for leaf, product, multiply_adds in products_of(op, self.graph):
                channels = self._of(leaf)
                channels.products.append(product)
                # What does not depend on the input is computed once for the batch.
                inputs = 1 if op.outputs[0].is_constant else images
                channels.macs += multiply_adds * product.times // (product.length * inputs)

    def _member_order(self, member: Member) -> tuple:
        key = member.tensor.rpartition(".")[2]
        tensors = ("weight", "bias", "running_mean", "running_var")
        rank = tensors.index(key) if key in tensors else len(tensors) + key.endswith("bias")
        module = self.modules[member.module]
        # A group is named after a layer, rather than after a parameter beside it.
        bare = not isinstance(module, (*LAYERS, *NORMS, nn.PReLU))
        return member.reads, bare, self.order[member.module], member.offset, -member.stride, rank, key, member.axis

    def _group(self, channels: _Channels, names: Counter[str]) -> Group:
        leaf, members = channels.leaf, channels.members
        exprs = [] if channels.zeroed else channels.exprs
        expr = gate_expr.parallel(exprs) if exprs else gate_expr.UNGATED
        gates, combine = gate_expr.resolve(expr, leaf.size)
        for gate in gates:
            gate.activation = self._activation(self.norm_ops[gate.norm])
        reason = leaf.reason
        if reason is None and not channels.exprs and not channels.zeroed:
            reason = "nothing reads it"
        first = members[0]
        name = first.module if first.tensor.endswith(".weight") else first.tensor
        if first.reads:
            name = "input" if reason == INPUT else f"{first.module}.input"
        name = f"{name}@{first.offset}" if first.offset else name
        names[name] += 1
        return Group(
            id=name if names[name] == 1 else f"{name}#{names[name]}",
            channels=leaf.size,
            members=members,
            gates=gates,
            combine=combine,
            statistics=channels.statistics,
            products=channels.products,
            zeroed=channels.zeroed,
            attributes=channels.attributes,
            params=self._params(members),
            macs=channels.macs,
            reason=reason,
        )

    def _params(self, members: Sequence[Member]) -> int:
        """The parameters of one channel."""
        params = 0
        for member in members:
            module, key = self.modules[member.module], member.tensor.rpartition(".")[2]
            if key in module._parameters:
                length = max(axis_length(module, key, member.axis), 1)
                params += math.prod(self.record.tensors[member.tensor].shape) // length * member.times
        return params

    def _pads(self, op: Op) -> bool:
        if not op.name.startswith("conv"):
            return False
        padding = op.arg(4, "padding", 0)
        if isinstance(padding, str):
            return padding == "same" and math.prod(op.args[1].shape[2:]) > 1
        return "transpose" in op.name or any(padding if isinstance(padding, list | tuple) else [padding])

    def _follow(self, op: Op, names: Sequence[str]) -> Op | None:
        """The first operation after ``op`` that is not one of ``names``; None where the chain branches, or an addition
        scales a term."""
        while len(op.outputs) == 1 and op.outputs[0] not in self.outputs and op.kwargs.get("alpha", 1) == 1:
            after = self.consumers[op.outputs[0]]
            if len(after) != 1:
                return None
            op = after[0]
            if op.name.rstrip("_") not in names:
                return op
        return None

    def _next_norm(self, reader: Op) -> str | None:
        norm = self._follow(reader, LINEAR_OPS)
        if self.record.calls[reader.module] > 1 or (reader.name == "linear" and len(reader.outputs[0].shape) != 2):
            return None  # it has several, or one of another axis
        if norm is None or norm.name not in ("batch_norm", "instance_norm"):
            return None
        name = norm.module
        module = self.modules[name]
        if not isinstance(module, NORMS) or self.record.calls[name] > 1 or module.running_mean is None:
            return None
        return name

    def _activation(self, norm: Op) -> str | None:
        after = self._follow(norm, ())
        if after is None:
            return None
        is_prelu = after.name.rstrip("_") == "prelu" and isinstance(self.modules[after.module], nn.PReLU)
        name = after.module if is_prelu else ACTIVATIONS.get(after.name.rstrip("_"))
        # A function with the name of a PReLU module could not be told from that module.
        return None if not is_prelu and isinstance(self.modules.get(name or ""), nn.PReLU) else name

    def untraced_groups(self) -> list[Group]:
        """Return a group that cannot be pruned for each layer that the trace does not contain."""
        names = {value.name for value in self.used}
        return [
            Group(
                id=name,
                channels=module.weight.shape[output_axis(module)],
                members=[Member(tensor=f"{name}.weight", axis=output_axis(module))],
                reason="not on the path from input to output (called in train mode only, or never)",
            )
            for name, module in self.modules.items()
            if isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear))
            and f"{name}.weight" in self.record.tensors
            and f"{name}.weight" not in names
        ]
