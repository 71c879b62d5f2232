"""Notes on a selection: where it differs from what was requested, and why, with numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prunekit.pruning.graph.liveness import below_threshold
from prunekit.pruning.plan import Group
from prunekit.utils.text import join_names, plural

if TYPE_CHECKING:
    from prunekit.pruning.selection.selector import Selection, Selector

Note = tuple[str, bool]  # a sentence, and whether to warn


@dataclass(frozen=True)
class Request:
    """What ``Selector.select`` was given: the name of the argument, its value, and whether a search chose it."""

    name: str
    value: float
    searched: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"


def describe_unprunable(groups: Sequence[Group]) -> str | None:
    """Return a sentence on the groups that cannot be pruned and the most common reasons; None where all can be."""
    reasons = Counter(group.reason for group in groups if group.reason is not None)
    if not reasons:
        return None
    common = reasons.most_common(3)
    parts = [f"{count} {reason}" for reason, count in common]
    if len(reasons) > len(common):
        parts.append(f"{reasons.total() - sum(count for _, count in common)} other")
    return f"{plural(reasons.total(), 'group')} cannot be pruned: {'; '.join(parts)}"


def explain(
    selector: Selector,
    selection: Selection,
    chosen: Mapping[str, set[int]],
    kept_for: Mapping[str, int],
    request: Request,
) -> Iterator[Note]:
    """Yield the notes on a selection.

    Args:
        selector: that made it.
        selection: without notes.
        chosen: for each group the channels chosen by their scores.
        kept_for: number of channels kept beyond the request, by reason.
        request: what was requested.
    """
    if request.name != "threshold":
        yield from _ties(selector, selection.requested, chosen)
    wanted = str(request) if selector.candidates else "the ratio of each layer"
    if not selection.pruned:
        yield _nothing_pruned(selector, request, kept_for), True
    elif not request.searched and (selection.pruned < selection.requested or any(kept_for.values())):
        yield (
            f"{plural(selection.pruned, 'channel')} pruned where {wanted} asks for {selection.requested}: "
            f"{_describe(kept_for)}",
            True,
        )
    if request.name == "threshold":
        yield from _layers_below_threshold(selector, request.value)
    more = sum(len(selection.dead[group] - channels) for group, channels in chosen.items())
    if more:
        yield f"{plural(more, 'channel')} more pruned, since nothing produces or reads them any more", False
    yield from _rounding(selector, selection)
    if selector.scope == "layer" and request.name == "threshold":
        yield "scope 'layer' applies to a pruning_ratio; a threshold is one for all layers", False
    if selector.scope == "layer" and request.name == "pruning_ratio" and request.value > 0:
        narrow = selector.competes & (np.floor(request.value * selector.widths + 1e-9) == 0)
        if narrow.any():
            yield f"{plural(narrow.sum(), 'group')} kept whole: {request} of it is less than a channel", False
    if selector.ignored.any():
        groups, channels = selector.ignored.sum(), selector.widths[selector.ignored].sum()
        yield f"ignored_layers keeps {plural(groups, 'group')} whole, with {plural(channels, 'channel')}", False
    unprunable = describe_unprunable(selector.all_groups)
    if unprunable:
        yield unprunable, False


def _nothing_pruned(selector: Selector, request: Request, kept_for: Mapping[str, int]) -> str:
    if not selector.groups:
        return "nothing is pruned: no group can be pruned"
    if selector.ignored.all():
        return "nothing is pruned: ignored_layers keeps every group whole"
    if any(kept_for.values()):
        return f"nothing is pruned: {_describe(kept_for)}"
    if not selector.candidates:
        return "nothing is pruned: the ratio of each layer is less than one of its channels"
    if request.name != "threshold":
        return f"nothing is pruned: {request} of {selector.candidates} channels is less than one"
    lowest = min(np.flatnonzero(selector.competes), key=lambda index: selector.scores[index].min())
    return (
        f"nothing is pruned: the smallest of {selector.candidates} scores is {selector.scores[lowest].min():.3g} "
        f"({selector.groups[lowest].id}), above {request}; raise the threshold or decay.weight, or train longer"
    )


def _ties(selector: Selector, requested: int, chosen: Mapping[str, set[int]]) -> Iterator[Note]:
    """Equal scores of which some are pruned and some are kept."""
    competing = np.flatnonzero(selector.competes)
    if not requested or not len(competing):
        return
    scores = np.concatenate([selector.sorted_scores[index] for index in competing])
    if len(scores) > 1 and scores.min() == scores.max():
        yield (
            f"all {len(scores)} scores are {scores[0]:.3g}, so they do not say which channels matter; the same share "
            "of each group is pruned",
            True,
        )
    elif selector.scope == "global":
        end = min(requested - int(selector.preset.sum()), selector.max_count)
        ranked = selector.ranked_scores
        if 0 < end < selector.max_count and ranked[end - 1] == ranked[end]:
            tied, pruned = int((scores == ranked[end]).sum()), int((ranked[:end] == ranked[end]).sum())
            yield (
                f"{tied} channels tie at the score {ranked[end]:.3g}, the last one pruned; {pruned} of them pruned",
                True,
            )
    else:
        yield from _ties_within_groups(selector, chosen)


def _ties_within_groups(selector: Selector, chosen: Mapping[str, set[int]]) -> Iterator[Note]:
    ties = []
    for index in np.flatnonzero(selector.competes):
        group, scores = selector.groups[index], selector.sorted_scores[index]
        count = len(chosen[group.id])
        if 0 < count < group.channels and scores[count - 1] == scores[count]:
            tied = scores == scores[count]
            ties.append((group.id, scores[count], int(tied.sum()), int(tied[:count].sum())))
    if ties:
        name, score, tied, pruned = ties[0]
        yield (
            f"in {plural(len(ties), 'group')} channels tie at the last score pruned; in {name} {tied} at the score "
            f"{score:.3g}, {pruned} of them pruned",
            True,
        )


def _layers_below_threshold(selector: Selector, threshold: float) -> Iterator[Note]:
    """Layers that remain only because of the limits."""
    best = below_threshold(selector.essential, threshold, lambda group: selector.scores[selector.index[group.id]])
    if best:
        yield (
            f"no channel of {join_names(list(best))} is above threshold {threshold:g} (the best has "
            f"{max(best.values()):.3g}), so only their best are kept; if they matter, train with a lower decay.weight",
            True,
        )


def _rounding(selector: Selector, selection: Selection) -> Iterator[Note]:
    """Groups whose number of kept channels is no multiple of ``round_to``."""
    kept = [(group, group.channels - len(selection.dead[group.id])) for group in selector.groups]
    odd = [f"{group.id} ({k} of {group.channels})" for group, k in kept if k % selector.round_to]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        yield (
            f"round_to {selector.round_to} is not met in {plural(len(odd), 'group')}: {', '.join(odd[:3])}{more}",
            True,
        )


def _describe(kept_for: Mapping[str, int]) -> str:
    return ", ".join(f"{n} kept {reason}" for reason, n in kept_for.items() if n)
