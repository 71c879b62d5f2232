"""Groups that cannot be pruned because the model's code relies on their number of channels.

The model runs without some channels of each group, and every operation must give the shape that follows from the axes.
Where one does not, numbers that modules keep, such as ``head_dim``, are tried as the cause; the others are named with
their line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import count

from torch import nn

from prunekit.pruning.graph.attributes import alike_in_other_modules, enclosing, lengths_kept_by, owner_of
from prunekit.pruning.graph.axis_terms import Fixed, Leaf, Prod, Term, leaves, parts_of, prod, resolve
from prunekit.pruning.graph.recorder import Op, Record
from prunekit.pruning.graph.trial import Fault, Trial, leaf_at, length_without, places_of
from prunekit.pruning.plan import Attribute, Group

MAX_MODULES = 200  # whose attributes follow one group
MAX_TRIALS = 500  # of a model; groups whose attributes are not found by then are not pruned


class FixedSizes:
    """Finds the groups on which a model's code relies, and the attributes that follow groups.

    Args:
        model: on the meta device.
        record: of the model, with axes.
        rerun: records a copy of the model; what fails has an attribute ``ops`` with the operations before.
    """

    def __init__(self, model: nn.Module, record: Record, rerun: Callable[[nn.Module], Record]):
        self._trial = Trial(model, record, rerun)
        self._model = model
        self._hopeless: set[tuple] = set()  # faults that nothing helped against
        self._tied: list[Term] = []
        self._channels: Set[Leaf] = frozenset()  # of all groups
        self._guesses: dict[Leaf, list[Attribute]] = {}

    def lock(self, groups: Mapping[Leaf, Group]) -> list[tuple[Term, Term]]:
        """Give groups on which the model fails a reason, and others their attributes.

        Returns:
            pairs of terms that must be the same. The groups have to be built again where there are any.
        """
        trial = self._trial
        tried = {
            leaf: group
            for leaf, group in groups.items()
            if group.reason is None and group.channels > 1 and trial.blocks(group) is not None
        }
        trial.ties, self._channels = [], set(groups)
        followed: dict[Leaf, Group] = {}
        failing: list[tuple[Leaf, Group, Fault]] = []
        # First without all groups that an operation fails for, then parts of the others.
        left = dict(tried)
        # Those in the places of failing ones in repeated layers: what follows the first is tried in all at once.
        twins: dict[Leaf, Group] = {}
        while left and not trial.ties and (fault := trial.run(left)) is not None:
            blamed = self._blamed(fault, left)
            found = len(failing)
            self._single_out(blamed, followed, failing)
            left = {leaf: group for leaf, group in left.items() if leaf not in blamed}
            for leaf, _, reached in failing[found:]:
                for op in trial.alike(reached.op):
                    twin = leaf_at(op, places_of(leaf, reached.op))
                    if twin in left and _numbered(op.module) == _numbered(reached.op.module):
                        twins[twin] = left.pop(twin)
        for some in self._parts(left) if not trial.ties else ():
            if (fault := trial.run(some)) is not None:
                self._single_out(self._blamed(fault, some), followed, failing)
        self._resolve(failing, followed, groups)
        if twins and not trial.ties:
            failing = []
            self._single_out(twins, followed, failing)
            self._resolve(failing, followed, groups)
        while followed and not trial.ties and (fault := trial.run(followed)) is not None:
            # Their attributes cannot follow all of them.
            blamed = {leaf: followed[leaf] for leaf in fault.leaves if leaf in followed} or dict(followed)
            for leaf, group in blamed.items():
                _lock(leaf, group, fault)
                del followed[leaf]
        self._tied += [a for _, a, _ in trial.ties]
        return [(a, b) for _, a, b in trial.ties]

    def _resolve(
        self, failing: Sequence[tuple[Leaf, Group, Fault]], followed: dict[Leaf, Group], groups: Mapping[Leaf, Group]
    ) -> None:
        """Give failing groups their attributes, or a reason. Where something is tied, they are tried again later."""
        for leaf, group, fault in failing if not self._trial.ties else ():
            # What was found just now in another layer of the kind, first.
            group.attributes = self._guesses.pop(leaf, [])
            works = bool(group.attributes) and self._trial.run({leaf: group}) is None
            if works or self._follow(leaf, group, fault, groups):
                followed[leaf] = group

    def _single_out(
        self, groups: dict[Leaf, Group], followed: dict[Leaf, Group], failing: list[tuple[Leaf, Group, Fault]]
    ) -> None:
        """Find which of some groups fail, with their faults, and which are right with the attributes of their like."""
        trial, suspects = self._trial, [groups]
        while suspects and not trial.ties:
            some = suspects.pop()
            for leaf in some.keys() & self._guesses.keys():
                some[leaf].attributes += self._guesses.pop(leaf)
            fault = trial.run(some)
            if fault is None:
                followed |= {leaf: group for leaf, group in some.items() if group.attributes}
            elif len(some) == 1:
                ((leaf, group),) = some.items()
                products = list(self._products(leaf, fault))
                trial.ties += [(leaf, *pair) for pair in products]
                failing += [] if products else [(leaf, group, fault)]
            else:
                items = list(some.items())
                suspects += [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]

    def _products(self, leaf: Leaf, fault: Fault) -> Iterator[tuple[Term, Term]]:
        """Products of as many channels as a leaf, or as an axis with it that the module reads."""
        elsewhere = not places_of(leaf, fault.op)
        for op in self._trial.alike(fault.op):
            # What was tied to a product before, or is one, is as long as other products, too.
            wholes = [*self._tied, *(self._trial.axes_in(op.module) if elsewhere else ())]
            yield from _products([leaf, *(t for t in wholes if leaf in set(leaves(t)))], op, self._channels)

    def _blamed(self, fault: Fault, groups: Mapping[Leaf, Group]) -> dict[Leaf, Group]:
        """The groups that an operation fails for: those that it has, else those of its module, else all."""
        found = {leaf: groups[leaf] for leaf in fault.leaves if leaf in groups}
        if not found:
            found = {leaf: groups[leaf] for leaf in self._trial.leaves_before(fault) if leaf in groups}
        return found or dict(groups)

    def _parts(self, groups: Mapping[Leaf, Group]) -> list[dict[Leaf, Group]]:
        """Parts of the groups, such that of any two that may fit each other by chance, one is cut without the other."""
        numbers: dict[Leaf, int] = {}
        for leaf in groups:
            taken = {number for other, number in numbers.items() if not self._trial.tells_apart(leaf, other)}
            numbers[leaf] = next(number for number in count() if number not in taken)
        bits = range(max(numbers.values(), default=0).bit_length())
        return [{leaf: group for leaf, group in groups.items() if numbers[leaf] >> bit & 1} for bit in bits]

    def _follow(self, leaf: Leaf, group: Group, fault: Fault, groups: Mapping[Leaf, Group]) -> bool:
        """Give a group the attributes that follow it, or a reason; return whether it has attributes."""
        kind = type(self._trial.model.get_submodule(fault.modules[0])) if fault.modules else None
        known = fault.op.line, fault.op.name, kind, places_of(leaf, fault.op), leaf.size
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
            twin = leaf_at(other, places_of(leaf, op))
            own = enclosing(other.module)
            if twin is not None and twin is not leaf and len(own) == len(levels):
                places = [(attribute, own[levels.index(attribute.module)]) for attribute in attributes]
                if all(self._is_alike(attribute, name) for attribute, name in places):
                    self._guesses[twin] = [a.model_copy(update={"module": name}) for a, name in places]

    def _is_alike(self, attribute: Attribute, name: str) -> bool:
        """Whether a module is of the class of an attribute's, and keeps the same there."""
        module, other = (self._model.get_submodule(module) for module in (attribute.module, name))
        if type(module) is not type(other):
            return False
        first, second = (getattr(*owner_of(one, attribute.name), None) for one in (module, other))
        return first == second


def _numbered(module: str) -> str:
    """The name of a module without numbers: that of the same module in all repeated layers."""
    return re.sub(r"\d+", "#", module)


def _lock(leaf: Leaf, group: Group, fault: Fault) -> None:
    leaf.reason = group.reason = f"the code relies on its number of channels: {fault.text}"
    group.attributes = []


def _follow(
    trial: Trial, leaf: Leaf, group: Group, fault: Fault, groups: Mapping[Leaf, Group]
) -> list[Attribute] | None:
    """Find the attributes of modules that have to follow a group; None where there are none that help, or where the
    group is tied to another one."""
    found: list[Attribute] = []
    modules = dict(trial.model.named_modules())
    for _ in range(MAX_MODULES):
        lengths = _lengths(leaf, group, fault.op)
        for chosen in _choices(trial, modules, fault.modules, lengths, found):
            if trial.count > MAX_TRIALS:
                return None
            changed = group.model_copy(update={"attributes": [*group.attributes, *found, *chosen]})
            after = trial.run({leaf: changed})
            if after is not None and (other := _partner(leaf, after, groups)) is not None:
                both = trial.run({leaf: changed, other: groups[other]}, equal=True)
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
            if (other := _as_long(trial, leaf, group, fault, groups)) is not None:
                trial.ties.append((leaf, leaf, other))
            return None
    return None


def _needed(
    trial: Trial,
    leaf: Leaf,
    group: Group,
    found: Sequence[Attribute],
    chosen: Sequence[Attribute],
    reached: Fault | None,
) -> list[Attribute]:
    """Those of the chosen attributes without which the model fails earlier."""
    needed = list(chosen)
    for attribute in chosen:
        others = [other for other in needed if other is not attribute]
        fault = trial.run({leaf: group.model_copy(update={"attributes": [*group.attributes, *found, *others]})})
        if fault is None or (reached is not None and fault.number >= reached.number):
            needed = others
    return needed


def _as_long(trial: Trial, leaf: Leaf, group: Group, fault: Fault, groups: Mapping[Leaf, Group]) -> Leaf | None:
    """A leaf of the same length whose number code may take from the other's: one that the operation has, else one that
    its module reads, where the model gets further, or to another layer of the kind, when both lose equally many."""
    op = fault.op
    elsewhere = [other for other in trial.alike(op) if other is not op]
    own = _leaves_as_long(leaf, [term for value in (*op.inputs, *op.outputs) for term in value.axes])
    if own:
        return own[0]
    for other in _leaves_as_long(leaf, trial.axes_in(op.module)):
        if other in groups:
            both = trial.run({leaf: group, other: groups[other]}, equal=True)
            if both is None or both.number > fault.number or both.op in elsewhere:
                return other
    return None


def _leaves_as_long(leaf: Leaf, terms: Sequence[Term]) -> list[Leaf]:
    found = [term for term in map(resolve, terms) if isinstance(term, Leaf) and term is not leaf]
    return list(dict.fromkeys(term for term in found if term.size == leaf.size and term.reason is None))


def _partner(leaf: Leaf, fault: Fault, groups: Mapping[Leaf, Group]) -> Leaf | None:
    """Another leaf of the same length that a fault is about, after attributes changed."""
    for other in fault.leaves:
        if other is not leaf and other.size == leaf.size and other in groups and groups[other].reason is None:
            return other
    return None


def _products(terms: Sequence[Term], op: Op, channels: Set[Leaf]) -> Iterator[tuple[Term, Term]]:
    """Yield products of as many channels as a term, such as heads with the channels of each, whose number code such as
    ``C // num_heads`` takes from the term. Images times windows are none, whatever their number."""
    for value in (*op.inputs, *op.outputs):
        for term in (part for axis in value.axes for part in parts_of(axis)):
            whole = prod(term.factors) if isinstance(term, Prod) else term  # without products in products
            factors = whole.factors if isinstance(whole, Prod) else ()
            for first in range(len(factors) - 1):
                part = prod(factors[first:])
                if any(isinstance(factor, Fixed) for factor in map(resolve, factors[first:])):
                    continue
                same = next((term for term in terms if _can_tie(term, part)), None)
                if same is not None and channels >= set(leaves(part)):
                    yield same, part
                    return


def _can_tie(a: Term, b: Term) -> bool:
    """Whether two terms are equally long, and nothing of one is at another place of the other."""
    a, b = resolve(a), resolve(b)
    if a is b or a.size != b.size:
        return False
    if isinstance(a, Prod) and isinstance(b, Prod) and len(a.factors) == len(b.factors):
        pairs = [(x, y) for x, y in zip(a.factors, b.factors, strict=True) if resolve(x) is not resolve(y)]
    else:
        pairs = [(a, b)]
    return bool(pairs) and not any(set(leaves(x)) & set(leaves(y)) or x.size != y.size for x, y in pairs)


def _choices(
    trial: Trial,
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
            if (after := length_without(term, {leaf: 1})) < term.size:
                lengths[term.size] = term.size - after
    return {**lengths, group.channels: 1}
