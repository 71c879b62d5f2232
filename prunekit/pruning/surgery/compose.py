"""Plans of plans: what is cut from a slim model in its channels is, in those of the builder's model, a plan again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.make_plan import make_plan


def compose(model: nn.Module, groups: Sequence[Group], first: Plan, slim_groups: Sequence[Group], second: Plan) -> Plan:
    """The plan that does at once what two plans do one after the other.

    Args:
        model: the builder's model, and its ``groups``.
        first: a plan of that model.
        slim_groups: the groups of the model that ``first`` makes of it.
        second: a plan of that slim model.

    Raises:
        PlanError: the slim model is not what ``first`` makes of the builder's.
    """
    dead = {g.id: set(range(g.channels)) - set(first.kept(g)) for g in groups if g.reason is None}
    carriers = {name: set(channels) for name, channels in first.carriers.items()}
    for group, slim_group in match_groups(groups, first, slim_groups):
        channels = first.kept(group)
        kept = second.kept(slim_group)
        dead[group.id] |= set(channels) - {channels[k] for k in kept}
        carriers.setdefault(group.id, set()).update(channels[k] for k in second.carriers.get(slim_group.id, ()))
    plan = make_plan(model, groups, dead)
    gone = tuple(f"{name}." for name in plan.removed)
    biases = {*first.added_bias, *second.added_bias}
    plan.added_bias = sorted(name for name in biases if not f"{name}.".startswith(gone))
    plan.carriers = {
        name: sorted(left) for name, channels in carriers.items() if (left := channels & set(plan.groups[name]))
    }
    return plan


def match_groups(groups: Sequence[Group], first: Plan, slim_groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Each group that is left of the builder's, with the slim model's own. Their names may differ, since a group is
    named after its first module and that may be gone; a module that makes channels is in the same group in both."""
    places: dict[str, list[tuple[int, Group]]] = defaultdict(list)
    for group in groups:
        if group.reason is None and first.kept(group):
            for member in group.members:
                if not member.reads:
                    places[member.tensor].append((member.offset, group))
    found = []
    for slim_group in slim_groups:
        if slim_group.reason is not None:
            continue
        member = slim_group.members[0]
        mine = sorted(
            (m.offset, g.id) for g in slim_groups for m in g.members if m.tensor == member.tensor and not m.reads
        )
        theirs = sorted(places[member.tensor], key=lambda item: item[0])
        at = mine.index((member.offset, slim_group.id))
        if at >= len(theirs) or len(first.kept(theirs[at][1])) != slim_group.channels:
            raise PlanError(f"the plan does not make the model that it is said to have made: {slim_group.id} differs")
        found.append((theirs[at][1], slim_group))
    return found
