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

OTHER_IMPORTANCE = "choose an importance that needs none, such as magnitude or taylor"
Note = tuple[str, bool]  # a sentence, and whether to warn


@dataclass(frozen=True)
class Request:
    """The argument that ``Selector.select`` was given, and whether a search chose its value."""

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
    by_threshold, by_layer = request.name == "threshold", selector.scope == "layer"
    kept = ", ".join(f"{n} kept {reason}" for reason, n in kept_for.items() if n)
    if not by_threshold and (ties := _ties(selector, selection.requested, chosen)):
        yield ties, True
    wanted = str(request) if selector.candidates else "the ratio of each layer"
    if not selection.pruned:
        yield f"nothing is pruned: {_why_nothing(selector, request, kept)}", True
    elif not request.searched and (selection.pruned < selection.requested or kept):
        pruned = plural(selection.pruned, "channel")
        yield f"{pruned} pruned where {wanted} asks for {selection.requested}: {kept}", True
    # Layers that remain only because of the limits.
    if by_threshold and (
        best := below_threshold(selector.essential, request.value, lambda g: selector.scores[selector.index[g.id]])
    ):
        yield (
            f"no channel of {join_names(list(best))} is above {request} (the best has {max(best.values()):.3g}), so "
            "only their best are kept; if they matter, train with a lower decay.weight",
            True,
        )
    if more := sum(len(selection.dead[group] - channels) for group, channels in chosen.items()):
        yield f"{plural(more, 'channel')} more pruned, since nothing produces or reads them any more", False
    widths = [
        (g, g.channels - len(selection.dead[g.id]), n) for g, n in zip(selector.groups, selector.rounding, strict=True)
    ]
    if odd := [f"{group.id} ({k} of {group.channels})" for group, k, multiple in widths if k % multiple]:
        names = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        yield f"round_to {selector.round_to} is not met in {plural(len(odd), 'group')}: {names}", True
    if by_layer and by_threshold:
        yield "scope 'layer' applies to a pruning_ratio; a threshold is one for all layers", False
    if by_layer and request.name == "pruning_ratio" and request.value > 0:
        narrow = selector.competes & (np.floor(request.value * selector.widths + 1e-9) == 0)
        if narrow.any():
            yield f"{plural(narrow.sum(), 'group')} kept whole: {request} of it is less than a channel", False
    if selector.ignored.any():
        groups, channels = selector.ignored.sum(), selector.widths[selector.ignored].sum()
        yield f"ignored_layers keeps {plural(groups, 'group')} whole, with {plural(channels, 'channel')}", False
    if selection.pruned and selector.unscored.any():
        yield f"{describe_unscored(selector)}; {OTHER_IMPORTANCE}", False
    if unprunable := describe_unprunable(selector.all_groups):
        yield unprunable, False


def describe_unscored(selector: Selector) -> str:
    groups, channels = selector.unscored.sum(), selector.widths[selector.unscored].sum()
    return (
        f"{plural(channels, 'channel')} in {plural(groups, 'group')} kept, since no gate (a norm's weight) ranks them"
    )


def _why_nothing(selector: Selector, request: Request, kept: str) -> str:
    if not selector.groups:
        return "no group can be pruned"
    if selector.unscored.all():
        return f"{describe_unscored(selector)}; {OTHER_IMPORTANCE}"
    if selector.ignored.all():
        return "ignored_layers keeps every group whole"
    if kept:
        return kept
    if not selector.candidates:
        return "the ratio of each layer is less than one of its channels"
    if request.name != "threshold":
        return f"{request} of {selector.candidates} channels is less than one"
    lowest = min(np.flatnonzero(selector.competes), key=lambda index: selector.scores[index].min())
    return (
        f"the smallest of {selector.candidates} scores is {selector.scores[lowest].min():.3g} "
        f"({selector.groups[lowest].id}), above {request}; raise the threshold or decay.weight, or train longer"
    )


def _ties(selector: Selector, requested: int, chosen: Mapping[str, set[int]]) -> str | None:
    """A sentence on equal scores of which some are pruned and some are kept."""
    competing = [
        (group, scores)
        for group, scores, competes in zip(selector.groups, selector.sorted_scores, selector.competes, strict=True)
        if competes
    ]
    if not requested or not competing:
        return None
    scores = np.concatenate([values for _, values in competing])
    if len(scores) > 1 and scores.min() == scores.max():
        return (
            f"all {len(scores)} scores are {scores[0]:.3g}, so they do not say which channels matter; the same share "
            "of each group is pruned"
        )
    if selector.scope == "isomorphic":
        return None  # ranks of different structures are equal by design
    if selector.scope == "global":
        end = min(requested - int(selector.preset.sum()), selector.max_count)
        ranked = selector.ranked_scores
        if 0 < end < selector.max_count and ranked[end - 1] == ranked[end]:
            tied, pruned = (scores == ranked[end]).sum(), (ranked[:end] == ranked[end]).sum()
            return f"{tied} channels tie at the score {ranked[end]:.3g}, the last one pruned; {pruned} of them pruned"
        return None
    ties = [
        (group.id, scores[count], scores == scores[count], count)
        for group, scores in competing
        if 0 < (count := len(chosen[group.id])) < group.channels and scores[count - 1] == scores[count]
    ]
    if not ties:
        return None
    name, score, tied, count = ties[0]
    return (
        f"in {plural(len(ties), 'group')} channels tie at the last score pruned; in {name} {tied.sum()} at the score "
        f"{score:.3g}, {tied[:count].sum()} of them pruned"
    )
