"""Channels to prune, step by step, by the importance that is lost for each millisecond saved.

The greedy rule for knapsacks (Dantzig, 1957), for the problem of HALP (Shen et al., NeurIPS 2022): a layer loses the
channels down to the next whole vector, or all of them. What that saves depends on what its neighbors have left, so it
is predicted anew before each step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np

from prunekit.errors import PlanError
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.selection.selector import Selector

MOST_STEPS = 16  # in which a group may lose its channels
LEAST_SAVED = 1e-6  # of the dense latency, to divide by


def removal_path(selector: Selector, size_model: SizeModel) -> list[np.ndarray]:
    """Return the numbers of channels to prune of each of the selector's groups, (groups,), from none to all that its
    limits allow, in the order of importance lost per millisecond saved.

    Raises:
        PlanError: a score is negative.
    """
    limits = selector.widest_limits()
    for group, scores, limit in zip(selector.groups, selector.sorted_scores, limits, strict=True):
        if limit and scores[0] < 0:
            raise PlanError(f"a score of {group.id} is negative; a latency needs an importance of at least 0")
    lost = [np.concatenate([[0.0], np.cumsum(scores)]) for scores in selector.sorted_scores]
    dead = selector.preset.copy()
    least = LEAST_SAVED * size_model.dense.latency_ms
    vector = 1 if size_model.latency is None else size_model.latency.terms.vector

    def state(index: int, number: int) -> tuple[float, float] | None:
        """The importance lost and the latency with another number; None where a layer would be dead."""
        changed = dead.copy()
        changed[index] = number
        changed = size_model.complete(changed, selector.groups)
        if (changed[index] < number) or selector.kills_a_layer(changed):
            return None
        importance = sum(float(values[n]) for values, n in zip(lost, changed, strict=True))
        return importance, size_model.size_without(_named(selector, changed)).latency_ms

    def price(index: int, number: int) -> tuple[float, float]:
        """Importance per millisecond; of equal ones, the largest saving comes first."""
        after = state(index, number)
        if after is None:
            return math.inf, 0.0
        saved = max(current[1] - after[1], least)
        return (after[0] - current[0]) / saved, -saved

    def options(index: int) -> Iterator[tuple[tuple[float, float], int, int, int]]:
        for number in _next_numbers(selector, index, int(dead[index]), int(limits[index]), vector):
            yield price(index, number), index, number, int(dead[index])

    path, current = [dead.copy()], (0.0, 0.0)
    if not len(dead):
        return path
    current = state(0, int(dead[0])) or current
    queue = [option for index in range(len(dead)) for option in options(index)]
    heapq.heapify(queue)
    while queue and queue[0][0][0] < math.inf:
        _, index, number, before = heapq.heappop(queue)
        if before != dead[index]:
            continue
        # The price was that of an earlier step; the less its neighbors have left, the less a layer saves.
        now = price(index, number)
        if queue and now[0] > queue[0][0][0] * (1 + 1e-9):
            heapq.heappush(queue, (now, index, number, before))
            continue
        current = state(index, number) or current
        dead[index] = number
        path.append(dead.copy())
        for option in options(index):
            heapq.heappush(queue, option)
    return path


def _named(selector: Selector, dead: np.ndarray) -> dict[str, int]:
    return {group.id: int(number) for group, number in zip(selector.groups, dead, strict=True)}


def _next_numbers(selector: Selector, index: int, dead: int, limit: int, vector: int) -> Iterator[int]:
    """The numbers of channels that a group may lose next: down to a whole vector, and all that the limit allows."""
    width, multiple = int(selector.widths[index]), int(selector.multiples[index])
    if dead >= limit:
        return
    kept, step = width - dead, math.lcm(multiple, vector * max(1, width // (MOST_STEPS * vector)))
    # The last vector by halves.
    number = min(width - ((kept - 1) // step * step if kept > step else kept // 2 // multiple * multiple), limit)
    yield number
    if number < limit:
        yield limit
