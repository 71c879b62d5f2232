"""Groups that cannot be pruned because the model's code relies on their number of channels.

The model runs without some channels of each group, and every operation must give the shape that follows from the axes.
Where one does not, numbers that modules keep, such as ``head_dim``, are tried as the cause; the others are named with
their line.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from prunekit.pruning.graph.attributes import alike_in_other_modules, enclosing, lengths_kept_by, running_modules
from prunekit.pruning.graph.axes import conv_groups
from prunekit.pruning.graph.axis_terms import Cat, Fixed, Leaf, Prod, Term, leaves, prod, resolve
from prunekit.pruning.graph.recorder import Op, Record
from prunekit.pruning.graph.rules.base import is_elementwise
from prunekit.pruning.graph.slicing import slice_model
from prunekit.pruning.plan import Attribute, Group
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line

# Operations whose whole numbers are not sizes, although they are not elementwise.
COUNTS = {"group_norm", "roll", "topk", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "lift_fresh", "fill"}
MAX_MODULES = 200  # whose attributes follow one group
_OWN = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[2]}/")


class FixedSizes:
    """Finds the groups on which a model's code relies, and the attributes that follow groups.

    Args:
        model: on the meta device.
        record: of the model, with axes.
        rerun: records a copy of the model; what fails has an attribute ``ops`` with the operations before.
    """

    def __init__(self, model: nn.Module, record: Record, rerun: Callable[[nn.Module], Record]):
        self._trial = _Trial(model, record, rerun)
        self._model = model
        self._hopeless: set[tuple] = set()  # faults that nothing helped against
        self._tied: list[Term] = []
        self._guesses: dict[Leaf, list[Attribute]] = {}

    def lock(self, groups: Mapping[Leaf, Group]) -> list[tuple[Term, Term]]:
        """Give groups on which the model fails a reason, and others their attributes.

        Returns:
            pairs of terms that must be the same. The groups have to be built again where there are any.
        """
        tried = {
            leaf: group
            for leaf, group in groups.items()
            if group.reason is None
            and group.channels > 1
            and all(conv_groups(self._model, member.module) == 1 for member in group.members)
        }
        trial = self._trial
        trial.ties = []
        # First without all groups that an operation fails for, then each of those.
        left, suspects = dict(tried), []
        while left and (fault := trial.run(left)) is not None:
            blamed = {leaf: left[leaf] for leaf in fault.leaves if leaf in left} or left
            suspects.append(blamed)
            left = {leaf: group for leaf, group in left.items() if leaf not in blamed}
        for some in self._parts(left):
            if (fault := trial.run(some)) is not None:
                blamed = {leaf: some[leaf] for leaf in fault.leaves if leaf in some} or some
                suspects.append(blamed)
        followed: dict[Leaf, Group] = {}
        failing: list[tuple[Leaf, Group, _Fault]] = []
        while suspects:
            some = suspects.pop()
            for leaf in some.keys() & self._guesses.keys():
                some[leaf].attributes += self._guesses.pop(leaf)
            fault = trial.run(some)
            if fault is None:
                followed |= {leaf: group for leaf, group in some.items() if group.attributes}
            elif len(some) == 1:
                ((leaf, group),) = some.items()
                # What was tied to a product before is as long as other products, too.
                terms = [leaf, *(term for term in self._tied if leaf in set(leaves(term)))]
                products = [pair for op in trial.alike(fault.op) for pair in _products(terms, op)]
                trial.ties += [(leaf, *pair) for pair in products]
                failing += [] if products else [(leaf, group, fault)]
            else:
                items = list(some.items())
                suspects += [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]
        # Those that fail with what is tied now are tried again.
        for leaf, group, fault in failing if not trial.ties else ():
            if self._follow(leaf, group, fault, groups):
                followed[leaf] = group
        while followed and not trial.ties and (fault := trial.run(followed)) is not None:
            # Their attributes cannot follow all of them.
            blamed = {leaf: followed[leaf] for leaf in fault.leaves if leaf in followed} or dict(followed)
            for leaf, group in blamed.items():
                _lock(leaf, group, fault)
                del followed[leaf]
        self._tied += [a for _, a, _ in trial.ties]
        return [(a, b) for _, a, b in trial.ties]

    def _parts(self, groups: Mapping[Leaf, Group]) -> list[dict[Leaf, Group]]:
        """Parts of the groups, such that of any two that may fit each other by chance, one is cut without the other."""
        items = list(groups.items())
        bits = range(max(len(items) - 1, 0).bit_length())
        return [dict(item for number, item in enumerate(items) if number >> bit & 1) for bit in bits]

    def _follow(self, leaf: Leaf, group: Group, fault: _Fault, groups: Mapping[Leaf, Group]) -> bool:
        """Give a group the attributes that follow it, or a reason; return whether it has attributes."""
        kind = type(self._trial.model.get_submodule(fault.modules[0])) if fault.modules else None
        known = fault.op.line, fault.op.name, kind, _role(leaf, fault.op), leaf.size
        attributes, group.attributes = None, []
        if known not in self._hopeless:
            attributes = _follow(self._trial, leaf, group, fault, groups)
        if any(leaf is tie[0] for tie in self._trial.ties):
            return False
        if attributes is None:
            self._hopeless.add(known)
            _lock(leaf, group, fault)
            return False
        group.attributes += attributes
        self._guess(leaf, fault.op, attributes)
        return True

    def _guess(self, leaf: Leaf, op: Op, attributes: Sequence[Attribute]) -> None:
        """What follows a leaf in one layer will follow that in the same place of the others of its kind."""
        levels = enclosing(op.module)
        if not all(attribute.module in levels for attribute in attributes):
            return
        for other in self._trial.alike(op):
            twin = _at(other, _role(leaf, op))
            own = enclosing(other.module)
            if twin is not None and twin is not leaf and len(own) == len(levels):
                places = [(attribute, own[levels.index(attribute.module)]) for attribute in attributes]
                self._guesses[twin] = [a.model_copy(update={"module": name}) for a, name in places]


def _at(op: Op, role: tuple) -> Leaf | None:
    """The leaf that an operation has in a place."""
    values = (*op.inputs, *op.outputs)
    for number, axis in role:
        if number < len(values) and axis < len(values[number].axes):
            term = resolve(values[number].axes[axis])
            if isinstance(term, Leaf) and term.reason is None:
                return term
    return None


def _lock(leaf: Leaf, group: Group, fault: _Fault) -> None:
    leaf.reason = group.reason = f"the code relies on its number of channels: {fault.text}"
    group.attributes = []


def _role(leaf: Leaf, op: Op) -> tuple:
    """Where an operation has a leaf."""
    values = (*op.inputs, *op.outputs)
    return tuple(
        (number, axis)
        for number, value in enumerate(values)
        for axis, term in enumerate(value.axes)
        if leaf in set(leaves(term))
    )


@dataclass
class _Fault:
    text: str
    op: Op  # of the record, at which the model differs
    number: int  # of the operation
    modules: list[str]  # that were running, the innermost first

    @property
    def leaves(self) -> list[Leaf]:
        terms = [term for value in (*self.op.inputs, *self.op.outputs) for term in value.axes]
        return list(dict.fromkeys(leaf for term in terms for leaf in leaves(term)))


@dataclass
class _Trial:
    model: nn.Module
    record: Record
    rerun: Callable[[nn.Module], Record]
    # Leaves with terms that must be the same, since one number is the length of both.
    ties: list[tuple[Leaf, Term, Term]] = field(default_factory=list)  # (the leaf that failed, one term, the other)
    # What followed a group before: (class, attribute, index).
    known: set[tuple[type, str, int | None]] = field(default_factory=set)
    _numbers: dict[Leaf, int] = field(default_factory=dict)  # of channels that are cut
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def _draw(self, size: int) -> int:
        return 1 + int(self._random.integers(max(size // 2, 1)))

    def modules_of(self, leaf: Leaf) -> list[str]:
        """The modules that compute with a leaf's channels, and those that they are in."""
        names: dict[str, None] = {}
        for op in self.record.ops:
            terms = [term for value in (*op.inputs, *op.outputs) for term in value.axes]
            if any(leaf in leaves(term) for term in terms):
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
            one, other = _at(x, _role(a, a_op)), _at(y, _role(b, b_op))
            if one is not None and other is not None and one is not a and one.size == a.size == other.size:
                self.ties.append((one, one, other))

    def run(self, groups: Mapping[Leaf, Group]) -> _Fault | None:
        """Cut the first channels of groups, and compare what the model does then."""
        try:
            copied = copy_module(self.model)
        except Exception:
            return None  # Such a model cannot be slimmed either, which names the reason.
        # Numbers that differ, so that no group is as long as another one by chance.
        cut = {leaf: self._numbers.setdefault(leaf, self._draw(leaf.size)) for leaf in groups}
        dead = {group.id: set(range(cut[leaf])) for leaf, group in groups.items()}
        slice_model(copied, list(groups.values()), dead)
        error = None
        try:
            ops = self.rerun(copied).ops
        except Exception as raised:  # It is the user's code and may raise anything.
            error, ops = raised, getattr(raised, "ops", [])
        # Of a model that reads values, what it computes and how often may depend on them.
        strict = all(value.is_meta for value in self.model.parameters())
        for number, (before, after) in enumerate(zip(self.record.ops, ops, strict=False)) if strict else ():
            if (text := _difference(before, after, cut)) is not None:
                return _Fault(text, before, number, enclosing(before.module))
        if error is None and (not strict or len(ops) == len(self.record.ops)):
            return None
        number = min(len(ops), len(self.record.ops) - 1)
        text = "it runs other operations" if error is None else f"{_line(error)} fails: {first_line(error)}"
        failing = self.record.ops[number]
        modules = running_modules(error, copied) if error is not None else []
        return _Fault(text, failing, number, list(dict.fromkeys([*modules, *enclosing(failing.module)])))


def _difference(before: Op, after: Op, cut: Mapping[Leaf, int]) -> str | None:
    """What an operation of the model without some channels does that does not follow from the axes."""
    if before.name != after.name:
        return f"{after.line} runs {after.name} instead of {before.name}"
    for old, new in zip(before.outputs, after.outputs, strict=False):
        expected = tuple(_length(term, cut) for term in old.axes)
        if new.shape != expected:
            return f"{after.name} ({after.line}) gives {_sides(new.shape)}, not {_sides(expected)}"
    counts = is_elementwise(before.name, before.func) or before.name.removesuffix("_") in COUNTS
    kinds = int | float if counts else float
    numbers = [
        [leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, kinds)] for op in (before, after)
    ]
    if numbers[0] != numbers[1]:
        return f"{after.name} ({after.line}) computes with the number of channels"
    return None


def _follow(
    trial: _Trial, leaf: Leaf, group: Group, fault: _Fault, groups: Mapping[Leaf, Group]
) -> list[Attribute] | None:
    """Find the attributes of modules that have to follow a group; None where there are none that help, or where the
    group is tied to another one."""
    found: list[Attribute] = []
    modules = dict(trial.model.named_modules())
    for _ in range(MAX_MODULES):
        lengths = _lengths(leaf, group, fault.op)
        for chosen in _choices(trial, modules, fault.modules, lengths, found):
            changed = group.model_copy(update={"attributes": [*group.attributes, *found, *chosen]})
            after = trial.run({leaf: changed})
            if after is not None and (other := _partner(leaf, after, groups)) is not None:
                both = trial.run({leaf: changed, other: groups[other]})
                if both is None or both.number > after.number:
                    trial.tie_alike(leaf, fault.op, other, after.op)
                    return None
            if after is None or after.number > fault.number:
                if len(chosen) > 1:
                    chosen = _needed(trial, leaf, group, found, chosen, after)
                found += chosen
                if after is not None:
                    # At once in all modules of the kind.
                    computing = {name: modules[name] for name in trial.modules_of(leaf)}
                    twins = alike_in_other_modules(computing, modules, found, chosen)
                    changed = group.model_copy(update={"attributes": [*group.attributes, *found, *twins]})
                    later = trial.run({leaf: changed}) if twins else after
                    if later is None or later.number > after.number:
                        found += twins
                        after = later
                trial.known |= {(type(modules[a.module]), a.name, a.index) for a in chosen}
                if after is None:
                    return found
                fault = after
                break
        else:
            if (other := _as_long(leaf, fault.op)) is not None:
                trial.ties.append((leaf, leaf, other))
            return None
    return None


def _needed(
    trial: _Trial,
    leaf: Leaf,
    group: Group,
    found: Sequence[Attribute],
    chosen: Sequence[Attribute],
    reached: _Fault | None,
) -> list[Attribute]:
    """Those of the chosen attributes without which the model fails earlier."""
    needed = list(chosen)
    for attribute in chosen:
        others = [other for other in needed if other is not attribute]
        fault = trial.run({leaf: group.model_copy(update={"attributes": [*group.attributes, *found, *others]})})
        if fault is None or (reached is not None and fault.number >= reached.number):
            needed = others
    return needed


def _as_long(leaf: Leaf, op: Op) -> Leaf | None:
    """A leaf of the same length that an operation has, whose number code may take from the other's."""
    for value in (*op.inputs, *op.outputs):
        for term in map(resolve, value.axes):
            if isinstance(term, Leaf) and term is not leaf and term.size == leaf.size and term.reason is None:
                return term
    return None


def _partner(leaf: Leaf, fault: _Fault, groups: Mapping[Leaf, Group]) -> Leaf | None:
    """Another leaf of the same length that a fault is about, after attributes changed."""
    for other in fault.leaves:
        if other is not leaf and other.size == leaf.size and other in groups and groups[other].reason is None:
            return other
    return None


def _products(terms: Sequence[Term], op: Op) -> Iterator[tuple[Term, Term]]:
    """Yield products of as many channels as a term, such as heads with the channels of each, whose number code such as
    ``C // num_heads`` takes from the term."""
    for value in (*op.inputs, *op.outputs):
        for term in map(resolve, value.axes):
            whole = prod(term.factors) if isinstance(term, Prod) else term  # without products in products
            factors = whole.factors if isinstance(whole, Prod) else ()
            for first in range(len(factors) - 1):
                part = prod(factors[first:])
                own = set(leaves(part))
                same = next((t for t in terms if t.size == part.size and not own & set(leaves(t))), None)
                if same is not None:
                    yield same, part
                    return


def _choices(
    trial: _Trial,
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    lengths: Mapping[int, int],
    found: Sequence[Attribute],
) -> Iterator[list[Attribute]]:
    """Yield sets of attributes that may be the cause: what followed another group first, then each of a module alone,
    then all of it. Few are tried first, since a number may have the same value by chance."""
    taken = {(attribute.module, attribute.name, attribute.index) for attribute in found}
    for name in names[:4]:
        own = [
            attribute
            for attribute in lengths_kept_by(name, modules[name], lengths)
            if (name, attribute.name, attribute.index) not in taken
        ]
        if not own:
            continue
        kind = type(modules[name])
        known = [a for a in own if (kind, a.name, a.index) in trial.known]
        if known and len(known) < len(own):
            yield known
        yield from ([attribute] for attribute in own)
        if len(own) > 1:
            yield own


def _lengths(leaf: Leaf, group: Group, op: Op) -> dict[int, int]:
    """The lengths of axes with the group's channels, and what each loses with one of them."""
    lengths = {}
    for value in (*op.outputs, *op.inputs):
        for term in value.axes:
            if (after := _length(term, {leaf: 1})) < term.size:
                lengths[term.size] = term.size - after
    return {**lengths, group.channels: 1}


def _sides(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _length(term: Term, cut: Mapping[Leaf, int]) -> int:
    """The length of an axis without so many channels of some leaves."""
    term = resolve(term)
    if isinstance(term, Fixed):
        return term.size
    if isinstance(term, Leaf):
        return term.size - cut.get(term, 0)
    if isinstance(term, Cat):
        return sum(_length(part, cut) for part in term.parts)
    assert isinstance(term, Prod)
    length = 1
    for factor in term.factors:
        length *= _length(factor, cut)
    return length


def _line(error: Exception) -> str:
    """The line of the user's code that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OWN)] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})"
