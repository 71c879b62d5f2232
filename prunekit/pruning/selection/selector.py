"""Scores → the channels to cut: by a threshold, by a share of all, or by their number.

Within a group the least channels go first, so what is chosen is one count for each group; limits (convolutions with
groups, ``min_channels``, ``round_to``, layers that must live) change these counts. Nothing is passed over in silence: a
choice says, with numbers, where it is not what was asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.liveness import (
    below_threshold,
    describe_unprunable,
    essential_groups,
    group_by_layer,
    removable,
)
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.importance import check_finite
from prunekit.pruning.selection.layers import Layer, match_layers
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.utils.text import join_names, plural

Scope = Literal["global", "layer"]
Scores = Mapping[str, np.ndarray]
# Why channels stay that were to go, in the order in which the limits come in.
_KEPT_FOR = (
    "so that the groups of a convolution stay of one size",
    "for min_channels {min_channels}",
    "so that every layer lives",
    "for round_to {round_to}",
)


@dataclass
class Selection:
    """What is to be cut.

    Attributes:
        dead: for each group the channels that go, with those that cannot live without them.
        removed: the modules of which nothing is left.
        asked: how many channels were to go.
        cut: how many go.
        notes: what is to be said of it, a sentence each.
        urgent: those of the notes that tell of something else than what was asked for.
        fewer: the one that says that fewer are cut than was asked for.
    """

    dead: dict[str, set[int]]
    removed: list[str]
    asked: int
    cut: int
    notes: list[str] = field(default_factory=list)
    urgent: list[str] = field(default_factory=list)
    fewer: str | None = None

    def say(self, note: str, urgent: bool = True) -> None:
        self.notes.append(note)
        if urgent:
            self.urgent.append(note)


class Selector:
    """Chooses the channels of one model that go; prepared once, asked as often as wanted.

    Args:
        model: the dense model.
        groups: of that model.
        scores: for each group that can be cut, its channels' scores, (channels,); see ``criteria``.
        scope: whether a share is taken of all channels together, or of each group.
        min_channels: kept in each group that survives.
        round_to: counts of kept channels are rounded up to its multiples, by giving back the best dead ones; a group
            that has no such count is kept whole.
        ignored_layers: modules of the model, or patterns (as in a shell) of their names; all channels that one of them, or
            a module inside it, produces or passes on are kept.
        ignored_groups: ids of groups whose channels are all kept.
        ratios: for some groups the share of their own channels to prune; they are not ranked with the others.

    Attributes:
        order: for each group that can be cut, the order in which its channels go.
        step: for each of them, what its count of kept channels is a multiple of, where it is not kept whole.
        channels: how many channels may be chosen from: all of the groups that can be cut and are not kept whole.
        most: the largest number that can be chosen.

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
        for name, value in (("min_channels", min_channels), ("round_to", round_to)):
            if value < 1:
                raise PlanError(f"{name} is at least 1, got {value}")
        if scope not in ("global", "layer"):
            raise PlanError(f"scope is 'global' or 'layer', got {scope!r}")
        check_finite(model)
        self.scope, self.min_channels, self.round_to = scope, min_channels, round_to
        self.all_groups = groups
        self.groups = [group for group in groups if group.reason is None]
        self.cutter = Cutter(model, groups, scores)
        whole = match_layers(model, groups, ignored_layers, "ignored_layers") | set(ignored_groups)
        self.widths = np.array([group.channels for group in self.groups], int)
        self.whole = np.array([group.id in whole for group in self.groups], bool)
        ratios = ratios or {}
        # Channels that are pruned whatever the ranking says.
        self.preset = np.array([_floor(ratios.get(group.id, 0) * group.channels) for group in self.groups], int)
        self.preset[self.whole] = 0
        self.fixed = self.whole | np.array([group.id in ratios for group in self.groups], bool)
        self.removable = np.array([removable(model, group) for group in self.groups], bool)
        self.values = [_checked(group, scores) for group in self.groups]
        self.unit = np.array([self._blocks(group) for group in self.groups], int)
        self.step = np.lcm(self.unit, round_to)
        ordered = [_ordered(values, unit) for values, unit in zip(self.values, self.unit, strict=True)]
        self.order, self.sorted = [order for order, _ in ordered], [values for _, values in ordered]
        self.at = {group.id: place for place, group in enumerate(self.groups)}
        self.layers = [[self.at[group.id] for group in layer] for layer in group_by_layer(self.groups)]
        self.vital = essential_groups(model, self.groups)
        self.channels = int(self.widths[~self.fixed].sum())
        self._rank()

    def _rank(self) -> None:
        """Put all channels that may be chosen into one order."""
        # The most that may go of each group, as one limit after another comes in.
        steps = [np.where(self.fixed, 0, self.widths - kept) for kept in self._steps(np.zeros_like(self.widths))]
        self.limits, self.reach = steps[-1], [int(limits.sum()) for limits in steps]
        self.most = int(self.limits.sum())
        owner = np.repeat(np.arange(len(self.groups)), self.limits)
        score = np.concatenate([s[:n] for s, n in zip(self.sorted, self.limits, strict=True)] or [np.zeros(0)])
        # Equal scores go from all groups alike, not from the first group until nothing of it is left.
        rows = zip(self.limits, self.widths, self.unit, strict=True)
        place = np.concatenate([np.arange(n) // unit * unit / width for n, width, unit in rows] or [score])
        ranking = np.lexsort((owner, place, score))
        self.owner, self.score = owner[ranking], score[ranking]

    def cut(self, *, threshold: float | None = None, share: float | None = None, count: int | None = None) -> Selection:
        """Choose.

        Args:
            threshold: channels whose score is at most this go.
            share: of ``channels``, 0 to 1, rounded down; the least go. With scope "layer", of each group.
            count: that many go, the least of all (scope "global" alone).

        Raises:
            PlanError: not exactly one of the three is given, or it is out of range.
        """
        given = {"threshold": threshold, "share": share, "count": count}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise PlanError(f"give one of threshold, share and count, not {' and '.join(given) or 'none of them'}")
        if threshold is not None:
            if not threshold >= 0:
                raise PlanError(f"threshold is at least 0, got {threshold}")
            wanted = np.array([np.searchsorted(values, threshold, "right") for values in self.sorted], int)
            wanted = np.where(self.fixed, self.preset, wanted)
            free = [values for values, fixed in zip(self.values, self.fixed, strict=True) if not fixed]
            asked = sum(int((values <= threshold).sum()) for values in free) + int(self.preset.sum())
        elif share is not None and not 0 <= share <= 1:
            raise PlanError(f"share is from 0 to 1, got {share}; 0.3 cuts 30 % of the channels")
        elif self.scope == "layer":
            if share is None:
                raise PlanError("count takes the least channels of all; with scope 'layer' give a share")
            wanted = np.where(self.fixed, self.preset, _floor(share * self.widths))
            asked = int(wanted.sum())
        else:
            if count is not None and not 0 <= count <= self.channels:
                raise PlanError(f"count is from 0 to the {self.channels} channels that can be cut, got {count}")
            asked = int(_floor(share * self.channels)) if count is None else count
            wanted = np.bincount(self.owner[:asked], minlength=len(self.groups)) + self.preset
            asked += int(self.preset.sum())
        return self._limited(wanted, asked, given)

    def _limited(self, wanted: np.ndarray, asked: int, given: Mapping[str, float]) -> Selection:
        """Hold the limits, let what cannot live without the dead die too, and say what came of it."""
        lost = np.zeros(4, int)  # as _KEPT_FOR
        if "threshold" in given:
            lost[0] = asked - wanted.sum()
        elif wanted.sum() < asked:
            # What a ranking of all has left out is what the limits keep.
            lost -= np.diff(np.minimum(asked - self.preset.sum(), self.reach))
        steps = self._steps(self.widths - wanted)
        lost += np.diff([int(kept.sum()) for kept in steps])
        kept = steps[-1]
        while True:
            chosen = {
                group.id: set(order[: width - k].tolist())
                for group, order, width, k in zip(self.groups, self.order, self.widths, kept, strict=True)
            }
            dead, removed = self.cutter.complete(chosen)
            starved = self._starved(dead)
            if not starved:
                break
            # Each layer had a living branch, but they did not meet: one layer kept its fine one, the next its coarse.
            before = kept
            kept = kept.copy()
            kept[starved] = np.minimum(kept[starved] + 1, self.widths[starved])
            kept = self._fit(kept, self.min_channels, self.step)
            lost[2] += int((kept - before).sum())
            if (kept == before).all():
                raise PlanError(
                    f"nothing reads {self.groups[starved[0]].id}, with all of its channels alive; the model has a gap "
                    "there"
                )
        numbers = {"min_channels": self.min_channels, "round_to": self.round_to}
        why = {name.format(**numbers): n for name, n in zip(_KEPT_FOR, lost.tolist(), strict=True)}
        why["because others need them"] = sum(len(chosen[name] - dead[name]) for name in chosen)
        choice = Selection(dead, removed, asked, sum(len(dead[group.id]) for group in self.groups))
        self._tell(choice, chosen, why, given)
        return choice

    def _steps(self, kept: np.ndarray) -> list[np.ndarray]:
        """Counts of kept channels, and what they become as one limit after another comes in (in the order of
        ``_KEPT_FOR``)."""
        steps = [kept, self._fit(kept, 0, self.unit)]
        steps.append(self._fit(steps[-1], self.min_channels, self.unit))
        alive = steps[-1].copy()
        for layer in self.layers:
            if not alive[layer].any():
                alive[max(layer, key=lambda place: self.sorted[place][-1])] = 1
        steps.append(self._fit(alive, self.min_channels, self.unit))
        return [*steps, self._fit(steps[-1], self.min_channels, self.step)]

    def _fit(self, kept: np.ndarray, least: int, step: np.ndarray) -> np.ndarray:
        """Counts of kept channels, raised to ``least`` in the groups that survive, and to multiples of ``step``."""
        raised = np.where((kept > 0) | ~self.removable, np.maximum(kept, least), kept)
        return np.minimum(-(-raised // step) * step, self.widths)

    def _blocks(self, group: Group) -> int:
        """In how many blocks a group's channels fall, of which none may lose more than another: as many as there are
        groups of a convolution that makes or reads them."""
        cutter, found = self.cutter, 1
        for key, blocks in cutter.blocks.items():
            # Where several groups stand side by side, it is ``Cutter.complete`` that gives channels back.
            if cutter.members[key][0][0] is group and cutter.lengths[key] == group.channels:
                found = max(found, blocks)
        return found

    def _starved(self, dead: Mapping[str, set[int]]) -> list[int]:
        """The groups of which one more channel must live: those of a dead layer, or what reads a layer to be kept."""
        gone = np.array([len(dead[group.id]) == group.channels for group in self.groups], bool)
        found = [place for layer in self.layers if gone[layer].all() for place in layer]
        for place in np.flatnonzero(gone & self.whole):
            readers = {member.tensor for member in self.groups[place].readers}
            found += [
                other
                for other, group in enumerate(self.groups)
                if any(member.axis == 0 and member.tensor in readers for member in group.members)
            ]
        return sorted(set(found))

    # ---- what is said

    def _tell(
        self, choice: Selection, chosen: Mapping[str, set[int]], lost: Mapping[str, int], given: Mapping[str, float]
    ) -> None:
        ((name, value),) = given.items()
        how = f"{name} {value:g}" if self.channels else "the ratio of each layer"
        if name != "threshold":
            self._tell_ties(choice, {self.at[group]: len(channels) for group, channels in chosen.items()})
        if not choice.cut:
            choice.say(self._nothing(name, how, lost))
        elif choice.cut < choice.asked or any(lost.values()):
            # A count is what a search tries, and what it searches for is something else.
            choice.fewer = f"{plural(choice.cut, 'channel')} cut where {how} asks for {choice.asked}: {_kept(lost)}"
            choice.say(choice.fewer, urgent=name != "count")
        if name == "threshold":
            self._tell_lifeless(choice, value)
        also = sum(len(choice.dead[group] - channels) for group, channels in chosen.items())
        if also:
            choice.say(
                f"{plural(also, 'channel')} more cut, since nothing makes or reads what they carry", urgent=False
            )
        if self.round_to > 1:
            self._tell_rounding(choice)
        if self.scope == "layer" and name == "threshold":
            choice.say("scope 'layer' means a share of each layer; a threshold is one for all", urgent=False)
        if self.scope == "layer" and name == "share" and value > 0:
            narrow = (~self.fixed) & (_floor(value * self.widths) == 0)
            if narrow.any():
                less = f"{how} of it is less than a channel"
                choice.say(f"{plural(narrow.sum(), 'group')} whole: {less}", urgent=False)
        if self.whole.any():
            choice.say(
                f"ignored_layers keeps {plural(self.whole.sum(), 'group')} whole, with "
                f"{plural(self.widths[self.whole].sum(), 'channel')}",
                urgent=False,
            )
        said = describe_unprunable(self.all_groups)
        if said:
            choice.say(said, urgent=False)

    def _nothing(self, name: str, how: str, lost: Mapping[str, int]) -> str:
        if not self.groups:
            return "nothing is cut: no group can be cut"
        if self.whole.all():
            return "nothing is cut: ignored_layers keeps every group whole"
        if any(lost.values()):
            return f"nothing is cut: {_kept(lost)}"
        if not self.channels:
            return "nothing is cut: the ratio of each layer is less than one of its channels"
        if name != "threshold":
            return f"nothing is cut: {how} of {self.channels} channels is less than one"
        free = [place for place in range(len(self.groups)) if not self.fixed[place]]
        least = min(free, key=lambda place: self.values[place].min())
        return (
            f"nothing is cut: the smallest of {self.channels} scores is {self.values[least].min():.3g} "
            f"({self.groups[least].id}), above {how}; raise the threshold or decay.weight, or train longer"
        )

    def _tell_ties(self, choice: Selection, counts: Mapping[int, int]) -> None:
        """Say where equal scores stand on both sides of the border."""
        free = [place for place in range(len(self.groups)) if not self.fixed[place]]
        if not choice.asked or not free:
            return
        everything = np.concatenate([self.sorted[place] for place in free])
        if len(everything) > 1 and everything.min() == everything.max():
            choice.say(
                f"all {len(everything)} scores are {everything[0]:.3g}, so they do not say which channels matter; "
                "the cut is spread evenly over the groups"
            )
            return
        if self.scope == "global":
            end = min(choice.asked - int(self.preset.sum()), self.most)
            if 0 < end < self.most and self.score[end - 1] == self.score[end]:
                tied = self.score[end]
                of = int((everything == tied).sum())
                cut = int((self.score[:end] == tied).sum())
                choice.say(f"{of} channels tie at the score {tied:.3g}, where the cut ends; {cut} of them cut")
            return
        tied = [p for p in free if 0 < counts[p] < self.widths[p] and _level(self.sorted[p], counts[p])]
        if tied:
            first = tied[0]
            score = self.sorted[first][counts[first]]
            of, cut = ((values == score).sum() for values in (self.sorted[first], self.sorted[first][: counts[first]]))
            choice.say(
                f"in {plural(len(tied), 'group')} channels tie where the cut ends; in {self.groups[first].id} {of} "
                f"at the score {score:.3g}, {cut} of them cut"
            )

    def _tell_lifeless(self, choice: Selection, threshold: float) -> None:
        """Say which layers live on by the limits alone."""
        found = below_threshold(self.vital, threshold, lambda group: self.values[self.at[group.id]])
        if found:
            choice.say(
                f"no channel of {join_names(list(found))} is above threshold {threshold:g} (the best has "
                f"{max(found.values()):.3g}), so their best alone stay; if they matter, train with a lower decay.weight"
            )

    def _tell_rounding(self, choice: Selection) -> None:
        kept = [(group, group.channels - len(choice.dead[group.id])) for group in self.groups]
        odd = [f"{group.id} ({k} of {group.channels})" for group, k in kept if k % self.round_to]
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            choice.say(
                f"round_to {self.round_to} is not met in {plural(len(odd), 'group')}: {', '.join(odd[:3])}{more}"
            )


def _kept(lost: Mapping[str, int]) -> str:
    return ", ".join(f"{n} kept {reason}" for reason, n in lost.items() if n)


def _checked(group: Group, scores: Scores) -> np.ndarray:
    if group.id not in scores:
        raise PlanError(f"the criterion gives no scores for {group.id}; it must give some for every group")
    values = np.asarray(scores[group.id], dtype=np.float64)
    if values.shape != (group.channels,):
        raise PlanError(f"the scores of {group.id} have shape {values.shape}, not ({group.channels},)")
    if not np.isfinite(values).all():
        raise PlanError(f"a score of {group.id} is not finite, so nothing can be read from it; train with a lower rate")
    return values


def _ordered(values: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which a group's channels go, and what they go by, both (channels,).

    Ascending scores, of equal ones the last first. Of several blocks one channel each goes at a time, when the largest
    score among these is reached.
    """
    table = values.reshape(blocks, -1)
    order = np.lexsort((np.broadcast_to(-np.arange(table.shape[1]), table.shape), table))
    sorted_ = np.take_along_axis(table, order, 1).max(0)
    return (order + np.arange(blocks)[:, None] * table.shape[1]).T.flatten(), np.repeat(sorted_, blocks)


def _floor(value: float | np.ndarray) -> np.ndarray:
    """Rounded down, but 0.3 · 10 is 3."""
    return np.floor(np.asarray(value) + 1e-9).astype(int)


def _level(values: np.ndarray, at: int) -> bool:
    return bool(values[at - 1] == values[at])
