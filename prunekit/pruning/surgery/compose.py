"""Composition of plans: a plan of a slim model, expressed in the channels of the dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.plan import Group, Member, Plan
from prunekit.pruning.surgery.plan_builder import make_plan


def compose(model: nn.Module, groups: Sequence[Group], first: Plan, slim_groups: Sequence[Group], second: Plan) -> Plan:
    """Return the plan that has the effect of two in sequence: one of the dense model, one of its slim model.

    Raises:
        PlanError: the slim model is not the result of ``first``.
    """
    dead = {g.id: set(range(g.channels)) - set(first.kept(g)) for g in groups if g.reason is None}
    carriers = {name: set(channels) for name, channels in first.carriers.items()}
    for group, slim_group in match_groups(groups, first, slim_groups):
        channels = first.kept(group)
        dead[group.id] |= set(channels) - {channels[k] for k in second.kept(slim_group)}
        carriers.setdefault(group.id, set()).update(channels[k] for k in second.carriers.get(slim_group.id, ()))
    plan = make_plan(model, groups, dead)
    removed = tuple(f"{name}." for name in plan.removed)
    plan.added_bias = sorted(n for n in {*first.added_bias, *second.added_bias} if not f"{n}.".startswith(removed))
    plan.carriers = {
        name: sorted(left) for name, channels in carriers.items() if (left := channels & set(plan.groups[name]))
    }
    return plan


def match_groups(groups: Sequence[Group], first: Plan, slim_groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Pair each prunable group of a slim model with its group in the dense model.

    Groups are matched by the position of their channels in a tensor, because ids may differ: a group is named after
    its first module, which may be removed.
    """
    dense_uses: dict[tuple[str, int], list[tuple[tuple[int, int], Group]]] = defaultdict(list)
    slim_places: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for group in groups:
        for member in group.members if first.kept(group) else ():
            if not member.reads:
                dense_uses[member.tensor, member.axis].append((_place(member), group))
    for member in (member for group in slim_groups for member in group.members if not member.reads):
        slim_places[member.tensor, member.axis].append(_place(member))
    pairs = []
    for slim_group in (group for group in slim_groups if group.reason is None):
        member = slim_group.members[0]
        axis = member.tensor, member.axis
        candidates = sorted(dense_uses[axis], key=lambda use: use[0])
        if len(candidates) > len(slim_places[axis]):
            # A factor of one channel, such as the last head, is no group of its own any more.
            candidates = [use for use in candidates if len(first.kept(use[1])) > 1] or candidates
        index = sorted(slim_places[axis]).index(_place(member))
        if index >= len(candidates) or len(first.kept(candidates[index][1])) != slim_group.channels:
            raise PlanError(f"the plan does not make this slim model: {slim_group.id} differs; pass the plan it has")
        pairs.append((candidates[index][1], slim_group))
    return pairs


def _place(member: Member) -> tuple[int, int]:
    """Outer factors of a product come before the inner ones."""
    return member.offset, -member.stride
