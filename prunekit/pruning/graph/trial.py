"""A trial cut: what a model does without some channels, compared with what follows from the axes."""

from __future__ import annotations

import math
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.pruning.graph.attributes import enclosing, running_modules
from prunekit.pruning.graph.axes import axis_length, conv_groups
from prunekit.pruning.graph.axis_terms import Cat, Fixed, Leaf, Prod, Term, leaves, resolve
from prunekit.pruning.graph.recorder import Op, Record, Value
from prunekit.pruning.graph.rules.base import is_elementwise
from prunekit.pruning.graph.slicing import slice_model
from prunekit.pruning.plan import Group
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line

# Operations whose whole numbers are not sizes, although they are not elementwise.
COUNTS = {"group_norm", "roll", "topk", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "fill"}
COMPUTES = "{} ({}) computes with the number of channels"
MAX_DRAWS = 16
FILLS = {"full": 1, "full_like": 1, "new_full": 2}  # where the number is
_OWN = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[2]}/")


@dataclass
class Fault:
    text: str
    op: Op  # of the record, at which the model differs
    number: int  # of the operation
    modules: list[str]  # that were running, the innermost first

    @property
    def leaves(self) -> list[Leaf]:
        return _leaves([self.op])


@dataclass
class Trial:
    model: nn.Module
    record: Record
    rerun: Callable[[nn.Module], Record]
    # Leaves with terms that must be the same, since one number is the length of both.
    ties: list[tuple[Leaf, Term, Term]] = field(default_factory=list)  # (the leaf that failed, one term, the other)
    # What followed a group before: (class, attribute, index).
    known: set[tuple[type, str, int | None]] = field(default_factory=set)
    count: int = 0  # of trials
    _numbers: dict[Leaf, int] = field(default_factory=dict)  # of channels that are cut
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def blocks(self, group: Group) -> int | None:
        """The number of blocks of a group's channels that must lose equally many, those of convolutions with groups;
        None where they are not blocks of the channels."""
        blocks = 1
        for member in group.members:
            number = self._grouped.get(member.module, 1)
            if number > 1:
                module, name = self.model.get_submodule(member.module), member.tensor.rpartition(".")[2]
                if member.times > 1 or group.channels != axis_length(module, name, member.axis):
                    return None
                blocks = math.lcm(blocks, number)
        return blocks if group.channels % blocks == 0 and group.channels > blocks else None

    @cached_property
    def _grouped(self) -> dict[str, int]:
        """The number of groups of convolutions that have several."""
        names = [name for name, module in self.model.named_modules() if getattr(module, "groups", 1) != 1]
        return {name: conv_groups(self.model, name) for name in names}

    def _draw(self, leaf: Leaf, blocks: int) -> int:
        """A number of channels of a leaf to cut, which differs from those of as many others as possible."""
        numbers = blocks * (1 + self._random.permutation(max(leaf.size // blocks // 2, 1))[:MAX_DRAWS])
        others = np.array([(other.size, number) for other, number in self._numbers.items()], np.int64).reshape(-1, 2)
        clashes = (~_differ(leaf.size, numbers[:, None], *others.T)).sum(1)
        return int(numbers[clashes.argmin()])

    def tells_apart(self, a: Leaf, b: Leaf) -> bool:
        """Whether code that takes the length of one of two leaves from the other one fails when both are cut."""
        return bool(_differ(a.size, self._numbers[a], b.size, self._numbers[b]))

    def leaves_before(self, fault: Fault) -> list[Leaf]:
        """The leaves that a module has come across when it fails."""
        return _leaves(op for op in self.record.ops[: fault.number + 1] if op.module == fault.op.module)

    def axes_in(self, module: str) -> list[Term]:
        """The axes that a module and those in it compute with."""
        axes = (resolve(term) for op in self._calls[module] for v in (*op.inputs, *op.outputs) for term in v.axes)
        return list({id(term): term for term in axes}.values())

    @cached_property
    def _calls(self) -> dict[str, list[Op]]:
        """The operations of each module and those in it."""
        found: dict[str, list[Op]] = defaultdict(list)
        for op in self.record.ops:
            for name in enclosing(op.module):
                found[name].append(op)
        return found

    def modules_of(self, leaf: Leaf) -> list[str]:
        """The modules that compute with a leaf's channels, and those that they are in."""
        names: dict[str, None] = {}
        for op in self.record.ops:
            if leaf in _leaves([op]):
                names.update(dict.fromkeys(enclosing(op.module)))
        return list(names)

    def alike(self, op: Op) -> list[Op]:
        """The calls of an operation by the same line of code."""
        return [other for other in self.record.ops if (other.line, other.name) == (op.line, op.name)]

    def tie_alike(self, a: Leaf, a_op: Op, b: Leaf, b_op: Op) -> None:
        """Tie two leaves, and those in the same places of other layers of their kind."""
        self.ties.append((a, a, b))
        first, second = self.alike(a_op), self.alike(b_op)
        for x, y in zip(first, second, strict=False) if len(first) == len(second) else ():
            one, other = leaf_at(x, places_of(a, a_op)), leaf_at(y, places_of(b, b_op))
            if one is not None and other is not None and one is not a and one.size == a.size == other.size:
                self.ties.append((one, one, other))

    @cached_property
    def reads_values(self) -> bool:
        """Whether what the model computes, and how often, may depend on values."""
        return not all(tensor.is_meta for tensor in self.model.parameters())

    @cached_property
    def stable(self) -> list[bool]:
        """For each operation, whether it does the same whatever the weights are."""
        ops = self.record.ops
        if not self.reads_values:
            return [True] * len(ops)
        generator = torch.Generator().manual_seed(0)
        other = copy_module(self.model)
        for tensor in (p.data for p in other.parameters() if p.is_floating_point()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.std(correction=0))
        try:
            again = self.rerun(other).ops
        except Exception as error:  # It is the user's code and may raise anything.
            again = getattr(error, "ops", [])
        stable, aligned = [], True
        varying: set[Value] = set()  # whose shapes depend on values
        for before, after in zip(ops, again, strict=False):
            aligned &= before.name == after.name
            if _depends_on_values(before) or not varying.isdisjoint(before.inputs):
                varying.update(before.outputs)
            shapes = [[value.shape for value in op.outputs] for op in (before, after)]
            same = shapes[0] == shapes[1] and _numbers(before) == _numbers(after)
            stable.append(aligned and same and varying.isdisjoint(before.outputs))
        return [*stable, *[False] * (len(ops) - len(stable))]

    def run(self, groups: Mapping[Leaf, Group], equal: bool = False) -> Fault | None:
        """Cut the first channels of groups, of all as many with ``equal``, and compare what the model does then.

        Groups with blocks lose the first channels of each.
        """
        self.count += 1
        try:
            # On the meta device, tensors have no values to change, and those that are cut are replaced.
            tensors = (*self.model.parameters(), *self.model.buffers())
            copied = copy_module(self.model, {id(tensor): tensor for tensor in tensors if tensor.is_meta})
        except Exception:
            return None  # Such a model cannot be slimmed either, which names the reason.
        # Small groups first, which have less choice.
        for leaf in sorted(groups.keys() - self._numbers.keys(), key=lambda leaf: leaf.size):
            self._numbers[leaf] = self._draw(leaf, self.blocks(groups[leaf]) or 1)
        cut = {leaf: self._numbers[leaf] for leaf in groups}
        blocks = {leaf: self.blocks(group) or 1 for leaf, group in groups.items()}
        if equal:
            whole = math.lcm(*blocks.values())
            cut = dict.fromkeys(cut, max(min(cut.values()) // whole, 1) * whole)
        dead = {
            group.id: set(np.arange(leaf.size).reshape(blocks[leaf], -1)[:, : cut[leaf] // blocks[leaf]].flat)
            for leaf, group in groups.items()
        }
        slice_model(copied, list(groups.values()), dead)
        error = None
        try:
            ops = self.rerun(copied).ops
        except Exception as raised:  # It is the user's code and may raise anything.
            error, ops = raised, getattr(raised, "ops", [])
        number = -1
        for number, before, after in _pairs(self.record.ops, ops):
            if self.reads_values and before.name != after.name:
                number = len(ops) - 1
                break
            if self.stable[number] and (text := self._difference(number, before, after, cut)) is not None:
                return Fault(text, before, number, enclosing(before.module))
        if error is None and (self.reads_values or _computing(ops) == _computing(self.record.ops)):
            return None
        number = min(number + 1, len(self.record.ops) - 1)
        text = "it runs other operations" if error is None else f"{_line(error)} fails: {first_line(error)}"
        failing = self.record.ops[number]
        modules = running_modules(error, copied) if error is not None else []
        return Fault(text, failing, number, list(dict.fromkeys([*modules, *enclosing(failing.module)])))

    def _difference(self, number: int, before: Op, after: Op, cut: Mapping[Leaf, int]) -> str | None:
        """What an operation of the model without some channels does that does not follow from the axes."""
        if before.name != after.name:
            return f"{after.line} runs {after.name} instead of {before.name}"
        for old, new in zip(before.outputs, after.outputs, strict=False):
            expected = tuple(length_without(term, cut) for term in old.axes)
            if new.shape != expected:
                return f"{after.name} ({after.line}) gives {_sides(new.shape)}, not {_sides(expected)}"
        return COMPUTES.format(after.name, after.line) if self._expected_numbers[number] != _numbers(after) else None

    @cached_property
    def _expected_numbers(self) -> list[list[Any]]:
        return [_numbers(op) for op in self.record.ops]


def _pairs(before: Sequence[Op], after: Sequence[Op]) -> Iterator[tuple[int, Op, Op]]:
    """Yield the operations of two records side by side, with their number in the first one.

    A tensor with one head is contiguous whatever the order of its axes, so that nothing is recorded.
    """
    first, second = 0, 0
    while first < len(before) and second < len(after):
        if before[first].name != after[second].name and "contiguous" in (before[first].name, after[second].name):
            first, second = first + (before[first].name == "contiguous"), second + (after[second].name == "contiguous")
            continue
        yield first, before[first], after[second]
        first, second = first + 1, second + 1


def _computing(ops: Sequence[Op]) -> int:
    return sum(op.name != "contiguous" for op in ops)


def _differ(size: Any, number: Any, other: Any, its: Any) -> Any:
    """Whether two lengths without so many of their entries have neither lost equally many nor kept their ratio, by more
    than a division rounds off."""
    return (abs(number - its) >= 2) & (abs(number * other - its * size) >= 2 * np.maximum(size, other))


def _depends_on_values(op: Op) -> bool:
    """Whether the shape of what an operation returns depends on values, or may."""
    if op.func is None or op.func.namespace != "aten":
        return True
    masked = any(value.is_mask for value in op.inputs)
    return torch.Tag.dynamic_output_shape in op.func.tags and (masked or not op.name.startswith("index"))


def _numbers(op: Op) -> list[Any]:
    """The numbers that an operation computes with."""
    counts = is_elementwise(op.name, op.func) or op.name.removesuffix("_") in COUNTS
    kinds = int | float if counts else float
    found: list[Any] = []
    _add_numbers((op.args, op.kwargs), kinds, found)
    found += [value.numbers for value in op.inputs]
    return [*found, op.arg(FILLS[op.name], "fill_value")] if op.name in FILLS else found


def _add_numbers(value: Any, kinds: Any, found: list[Any]) -> None:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        if isinstance(value, kinds):
            found.append(value)
        return
    for part in value:
        _add_numbers(part, kinds, found)


def _leaves(ops: Iterable[Op]) -> list[Leaf]:
    terms = [term for op in ops for value in (*op.inputs, *op.outputs) for term in value.axes]
    return list(dict.fromkeys(leaf for term in terms for leaf in leaves(term)))


def _sides(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def length_without(term: Term, cut: Mapping[Leaf, int]) -> int:
    """The length of an axis without so many channels of some leaves."""
    term = resolve(term)
    if isinstance(term, Fixed):
        return term.size
    if isinstance(term, Leaf):
        return term.size - cut.get(term, 0)
    if isinstance(term, Cat):
        return sum(length_without(part, cut) for part in term.parts)
    assert isinstance(term, Prod)
    length = 1
    for factor in term.factors:
        length *= length_without(factor, cut)
    return length


def _line(error: Exception) -> str:
    """The line of the user's code that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OWN)] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})"


def leaf_at(op: Op, role: tuple) -> Leaf | None:
    """The leaf that an operation has in a place."""
    values = (*op.inputs, *op.outputs)
    for number, axis in role:
        if number < len(values) and axis < len(values[number].axes):
            term = resolve(values[number].axes[axis])
            if isinstance(term, Leaf) and term.reason is None:
                return term
    return None


def places_of(leaf: Leaf, op: Op) -> tuple:
    """Where an operation has a leaf."""
    values = (*op.inputs, *op.outputs)
    return tuple(
        (number, axis)
        for number, value in enumerate(values)
        for axis, term in enumerate(value.axes)
        if leaf in set(leaves(term))
    )
