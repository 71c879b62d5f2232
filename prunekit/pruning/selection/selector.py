"""Scores → the channels to prune, by a threshold, a share of all channels, or their number.

Within a group the channels with the lowest scores are pruned first, so a selection is one count for each group. Limits
(convolutions with groups, ``min_channels``, ``round_to``, layers that must keep a channel) change these counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.liveness import essential_groups, group_by_layer, removable
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.explain import OTHER_IMPORTANCE, Request, explain
from prunekit.pruning.selection.importance import check_finite
from prunekit.pruning.selection.isomorphic import rank_within_structures
from prunekit.pruning.selection.layer_matching import Layer, match_layers
from prunekit.pruning.surgery.cutter import Cutter

Scope = Literal["global", "isomorphic", "layer"]
Scores = Mapping[str, np.ndarray]
# Why channels are kept that were requested to go, in the order in which the limits apply.
_LIMITS = (
    "so that the groups of a convolution stay of one size",
    "for min_channels {min_channels}",
    "so that every layer lives",
    "for round_to {round_to}",
)


@dataclass
class Selection:
    """The channels to prune."""

    dead: dict[str, set[int]]  # of each group, with those that nothing else produces or reads any more
    removed: list[str]  # the modules of which nothing is left
    requested: int  # number of channels
    pruned: int  # number of channels
    notes: list[str] = field(default_factory=list)  # where it differs from the request, and why, one sentence each
    warnings: list[str] = field(default_factory=list)  # those of the notes that the user should see

    def add_note(self, note: str, warn: bool = True) -> None:
        self.notes.append(note)
        if warn:
            self.warnings.append(note)


class Selector:
    """Selects the channels of one model to prune; prepared once, for any number of selections.

    Args (others as for ``extract``):
        scores: for each group its channels' scores; groups without gates that have none keep all channels.
        ignored_groups: ids of groups whose channels are all kept.
        ratios: for some groups the share of their own channels to prune; they do not compete with the others.

    Attributes:
        groups: those that can be pruned; all lists and arrays have an entry for each of them.
        limits: the largest number of channels to prune of those that compete; ``max_count`` is their sum.
        candidates: number of channels that compete.
        unscored: which groups have no scores.

    Raises:
        PlanError: scores that are missing or not finite, a limit out of range, or a pattern that matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        scores: Scores,
        *,
        scope: Scope = "global",
        min_channels: int = 1,
        round_to: int = 1,
        ignored_layers: Sequence[Layer] = (),
        ignored_groups: Collection[str] = (),
        ratios: Mapping[str, float] | None = None,
    ):
        check_limits(min_channels, round_to)
        if scope not in get_args(Scope):
            raise PlanError(f"scope={scope!r}: must be 'global', 'isomorphic' or 'layer'")
        check_finite(model)
        self.scope, self.min_channels, self.round_to = scope, min_channels, round_to
        self.all_groups = groups
        self.groups = [group for group in groups if group.reason is None]
        self.index = {group.id: index for index, group in enumerate(self.groups)}
        self.cutter = Cutter(model, groups, scores)
        ignored, ratios = match_layers(model, groups, ignored_layers) | set(ignored_groups), ratios or {}
        self.widths = np.array([group.channels for group in self.groups], int)
        self.ignored = np.array([group.id in ignored for group in self.groups], bool)
        # Number of channels to prune whatever the ranking says; 0 in ignored groups.
        self.preset = np.array([_floor(ratios.get(group.id, 0) * group.channels) for group in self.groups], int)
        self.preset[self.ignored] = 0
        self.unscored = np.array([group.combine is None and group.id not in scores for group in self.groups], bool)
        for group in (self.groups[index] for index in np.flatnonzero(self.unscored & (self.preset > 0))):
            raise PlanError(f"the channels of {group.id} pass no gate to rank them by; {OTHER_IMPORTANCE}")
        has_ratio = np.array([group.id in ratios for group in self.groups], bool)
        self.competes = ~(self.ignored | self.unscored | has_ratio)
        self.removable = np.array([removable(model, group) for group in self.groups], bool)
        self.scores = _zeros_first(model, self.groups, [self._scores(group, scores) for group in self.groups])
        if scope == "isomorphic":
            self.scores = rank_within_structures(model, self.groups, self.scores)
        self.blocks = np.array([self._conv_blocks(group) for group in self.groups], int)
        self.rounding = np.array([_rounding(group, self.groups, round_to) for group in self.groups], int)
        self.multiples = np.lcm(self.blocks, self.rounding)
        ordered = [_prune_order(values, blocks) for values, blocks in zip(self.scores, self.blocks, strict=True)]
        self.prune_order, self.sorted_scores = [order for order, _ in ordered], [values for _, values in ordered]
        self.layers = [[self.index[group.id] for group in layer] for layer in group_by_layer(self.groups)]
        self.essential = essential_groups(model, self.groups)
        self.candidates = int(self.widths[self.competes].sum())
        self._rank()

    def _scores(self, group: Group, scores: Scores) -> np.ndarray:
        return np.full(group.channels, np.inf) if self.unscored[self.index[group.id]] else _check_scores(group, scores)

    def _rank(self) -> None:
        # The most that may be pruned of each group, as one limit after another applies.
        steps = [np.where(self.competes, self.widths - kept, 0) for kept in self._apply_limits(0 * self.widths)]
        self.limits, self._limit_totals = steps[-1], [int(limits.sum()) for limits in steps]
        self.max_count = int(self.limits.sum())
        owner = np.repeat(np.arange(len(self.groups)), self.limits)
        scores = np.concatenate([s[:n] for s, n in zip(self.sorted_scores, self.limits, strict=True)] or [np.zeros(0)])
        # Ties are spread over all groups, rather than emptying the first group before the next.
        rows = zip(self.limits, self.widths, self.blocks, strict=True)
        depth = np.concatenate([np.arange(n) // block * block / width for n, width, block in rows] or [scores])
        ranking = np.lexsort((owner, depth, scores))
        self.ranked_groups, self.ranked_scores = owner[ranking], scores[ranking]

    def select(
        self,
        *,
        threshold: float | None = None,
        pruning_ratio: float | None = None,
        count: int | None = None,
        searched: bool = False,
    ) -> Selection:
        """Select channels to prune by one of three numbers.

        Args:
            threshold: prunes channels whose score is at most this.
            pruning_ratio: share of the ``candidates``, 0 to 1, rounded down; with scope "layer", of each group.
            count: number of channels with the lowest scores (scope "global" only).
            searched: a search for a target chose the value, so no note compares it with what is pruned.
        """
        options = {"threshold": threshold, "pruning_ratio": pruning_ratio, "count": count}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) != 1:
            raise PlanError(
                f"give one of threshold, pruning_ratio and count, not {' and '.join(given) or 'none of them'}"
            )
        ((name, value),) = given.items()
        if name == "threshold" and not value >= 0:
            raise PlanError(f"threshold={value}: must be at least 0")
        if name == "pruning_ratio" and not 0 <= value <= 1:
            raise PlanError(f"pruning_ratio={value}: must be from 0 to 1; 0.3 prunes 30% of the channels")
        if name == "count" and self.scope == "layer":
            raise PlanError("count ranks the channels of all layers; with scope 'layer' give a pruning_ratio")
        if name == "count" and not 0 <= value <= self.candidates:
            raise PlanError(f"count={value}: must be from 0 to the {self.candidates} channels that can be pruned")
        if name == "threshold" and self.scope == "isomorphic" and not searched:
            raise PlanError("scope 'isomorphic' replaces scores by ranks; give a pruning_ratio instead of a threshold")
        preset = int(self.preset.sum())
        if name == "threshold":
            below = np.array([np.searchsorted(values, value, "right") for values in self.sorted_scores], int)
            wanted = np.where(self.competes, below, self.preset)
            competing = [values for values, competes in zip(self.scores, self.competes, strict=True) if competes]
            requested = sum(int((values <= value).sum()) for values in competing) + preset
        elif self.scope == "layer":
            wanted = np.where(self.competes, _floor(value * self.widths), self.preset)
            requested = int(wanted.sum())
        else:
            number = int(_floor(value * self.candidates)) if name == "pruning_ratio" else int(value)
            wanted = np.bincount(self.ranked_groups[:number], minlength=len(self.groups)) + self.preset
            requested = number + preset
        return self._select(wanted, requested, Request(name, value, searched))

    def select_counts(self, counts: np.ndarray) -> Selection:
        """Select so many channels of each group, (groups,), those with the lowest scores; limits apply as always."""
        wanted = np.where(self.competes, counts, self.preset)
        return self._select(wanted, int(wanted.sum()), Request("count", int(wanted.sum()), searched=True))

    def _select(self, wanted: np.ndarray, requested: int, request: Request) -> Selection:
        """Apply the limits, add the channels that cannot live without the selected ones, and explain the result."""
        extra = np.zeros(4, int)  # channels kept beyond the request, as _LIMITS
        if request.name == "threshold":
            extra[0] = requested - wanted.sum()
        elif wanted.sum() < requested:
            # The ranking leaves out what the limits keep.
            extra -= np.diff(np.minimum(requested - self.preset.sum(), self._limit_totals))
        steps = self._apply_limits(self.widths - wanted)
        extra += np.diff([int(kept.sum()) for kept in steps])
        kept = steps[-1]
        while True:
            rows = zip(self.groups, self.prune_order, self.widths - kept, strict=True)
            chosen = {group.id: set(order[:number].tolist()) for group, order, number in rows}
            dead, removed = self.cutter.complete(chosen)
            if not (starved := self._starved_groups(dead)):
                break
            # Each layer keeps a branch, but those of neighbouring layers do not meet: fine in one, coarse in the next.
            before = kept
            kept = kept.copy()
            kept[starved] = np.minimum(kept[starved] + 1, self.widths[starved])
            kept = self._round_up(kept, self.min_channels, self.multiples)
            extra[2] += int((kept - before).sum())
            if (kept == before).all():
                raise PlanError(
                    f"nothing reads {self.groups[starved[0]].id}, with all of its channels kept; the model has a gap "
                    "there"
                )
        numbers = {"min_channels": self.min_channels, "round_to": self.round_to}
        kept_for = {name.format(**numbers): n for name, n in zip(_LIMITS, extra.tolist(), strict=True)}
        kept_for["because others need them"] = sum(len(chosen[name] - dead[name]) for name in chosen)
        selection = Selection(dead, removed, requested, sum(len(dead[group.id]) for group in self.groups))
        for note, warn in explain(self, selection, chosen, kept_for, request):
            selection.add_note(note, warn)
        return selection

    def _apply_limits(self, kept: np.ndarray) -> list[np.ndarray]:
        """Counts of kept channels, and what they become as one limit of ``_LIMITS`` after another applies."""
        steps = [kept, self._round_up(kept, 0, self.blocks)]
        steps.append(self._round_up(steps[-1], self.min_channels, self.blocks))
        alive = steps[-1].copy()
        for layer in self.layers:
            if not alive[layer].any():
                alive[max(layer, key=lambda index: self.sorted_scores[index][-1])] = 1
        steps.append(self._round_up(alive, self.min_channels, self.blocks))
        return [*steps, self._round_up(steps[-1], self.min_channels, self.multiples)]

    def _round_up(self, kept: np.ndarray, least: int, multiples: np.ndarray) -> np.ndarray:
        """Counts of kept channels, raised to ``least`` in the groups that remain, and to multiples."""
        raised = np.where((kept > 0) | ~self.removable, np.maximum(kept, least), kept)
        return np.minimum(-(-raised // multiples) * multiples, self.widths)

    def _conv_blocks(self, group: Group) -> int:
        """Number of blocks of the group's channels that must lose equally many: the groups of a convolution on them."""
        cutter = self.cutter
        # Where several groups share the axis, ``Cutter.complete`` gives channels back instead.
        alone = [a for a in cutter.blocks if cutter.members[a][0][0] is group and cutter.lengths[a] == group.channels]
        return max([1, *(cutter.blocks[axis] for axis in alone)])

    def _starved_groups(self, dead: Mapping[str, set[int]]) -> list[int]:
        """The groups that must keep one more channel: those of dead layers, and those that read an ignored layer."""
        return self._starved(np.array([len(dead[group.id]) == group.channels for group in self.groups], bool))

    def widest_limits(self) -> np.ndarray:
        """The largest number of channels to prune of each group that competes, (groups,), whatever others lose."""
        least = self._round_up(0 * self.widths, self.min_channels, self.multiples)
        return np.where(self.competes, self.widths - least, 0)

    def kills_a_layer(self, counts: np.ndarray) -> bool:
        """Whether a layer is dead without so many channels of each group, (groups,)."""
        return bool(self._starved(counts >= self.widths))

    def _starved(self, gone: np.ndarray) -> list[int]:
        starved = {index for layer in self.layers if gone[layer].all() for index in layer}
        for index in np.flatnonzero(gone & self.ignored):
            readers = {member.tensor for member in self.groups[index].readers}
            starved |= {
                other
                for other, group in enumerate(self.groups)
                if any(member.axis == 0 and member.tensor in readers for member in group.members)
            }
        return sorted(starved)


def check_limits(min_channels: int, round_to: int) -> None:
    """Raise PlanError where a limit is out of range."""
    for name, value in (("min_channels", min_channels), ("round_to", round_to)):
        if value < 1:
            raise PlanError(f"{name}={value}: must be at least 1")


def _zeros_first(model: nn.Module, groups: Sequence[Group], scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Give channels whose gates are zero the lowest score: whatever their weights, removing them changes nothing."""
    lowest = min((float(values.min()) for values in scores if values.size), default=0.0)
    return [np.where(gate_scores(model, g) == 0, min(lowest, 0.0), s) for g, s in zip(groups, scores, strict=True)]


def _check_scores(group: Group, scores: Scores) -> np.ndarray:
    if group.id not in scores:
        raise PlanError(f"importance gives no scores for {group.id}; it must give some for every group")
    values = np.asarray(scores[group.id], dtype=np.float64)
    if values.shape != (group.channels,):
        raise PlanError(f"the scores of {group.id} have shape {values.shape}, not ({group.channels},)")
    if not np.isfinite(values).all():
        raise PlanError(f"a score of {group.id} is not finite; train with a lower learning rate")
    return values


def _prune_order(scores: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which a group's channels are pruned, and the score at which each is, both (channels,).

    Ascending scores; of equal ones the last first. With several blocks one channel of each is pruned at a time, at the
    largest of their scores.
    """
    table = scores.reshape(blocks, -1)
    order = np.lexsort((np.broadcast_to(-np.arange(table.shape[1]), table.shape), table))
    sorted_scores = np.take_along_axis(table, order, 1).max(0)
    return (order + np.arange(blocks)[:, None] * table.shape[1]).T.flatten(), np.repeat(sorted_scores, blocks)


def _rounding(group: Group, others: Sequence[Group], round_to: int) -> int:
    """The number of which a group keeps a multiple, so that ``round_to`` divides the lengths of its axes.

    Heads may be of any number where each has a multiple of channels.
    """
    if round_to == 1:
        return 1
    axes = {(m.tensor, m.axis, m.offset): m.stride for m in group.members}
    inner = any(axes.get((m.tensor, m.axis, m.offset), 0) > m.stride for other in others for m in other.members)
    return 1 if inner else round_to // math.gcd(round_to, *axes.values())


def _floor(value: float | np.ndarray) -> np.ndarray:
    """Rounded down, but 0.3 · 10 is 3."""
    return np.floor(np.asarray(value) + 1e-9).astype(int)
