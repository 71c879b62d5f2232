"""Lengths of axes without some channels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from prunekit.pruning.plan import Group, Span


class AxisLengths:
    """Computes the lengths of axes from the numbers of dead channels of groups.

    Args:
        groups: all groups.
        lengths: of the axes with all channels, by any key.
        carried: for each axis in ``lengths`` the groups whose channels it has, and where.

    Attributes:
        count: number of axes.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        lengths: Mapping[Any, int],
        carried: Mapping[Any, Sequence[tuple[Group, Span]]],
    ):
        self._width = np.array([group.channels for group in groups], np.int64)
        self._length = np.array(list(lengths.values()), np.int64)
        self.count = len(lengths)
        numbers = {id(group): g for g, group in enumerate(groups)}
        strides, self._shared = [], []
        for row, (axis, length) in enumerate(lengths.items()):
            alone, shared = _owners(length, [(numbers[id(group)], group, span) for group, span in carried[axis]])
            strides += [(row, g, times) for g, times in alone]
            self._shared += [(row, owners, count) for owners, count in shared]
        self._strides = sparse_matrix(strides, (len(lengths), len(groups)))

    def without(self, dead: np.ndarray) -> np.ndarray:
        """Return the lengths that remain, in the order of ``lengths``; ``dead`` are numbers of channels, (groups,)."""
        kept = self._length - self._strides @ dead
        for row, owners, number in self._shared:
            left = math.prod(int(self._width[g] - dead[g]) for g in owners)
            kept[row] -= number - number // math.prod(int(self._width[g]) for g in owners) * left
        return kept


def sparse_matrix(entries: list[tuple[int, int, int]], shape: tuple[int, int]) -> csr_matrix:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((np.array(values, np.int64), (rows, columns)), shape)


def _owners(
    length: int, members: Sequence[tuple[int, Group, Span]]
) -> tuple[list[tuple[int, int]], list[tuple[tuple[int, ...], int]]]:
    """Return the groups that an axis has entries of: those alone, with the number of entries of a channel, and those
    that share entries, with the number of these entries."""
    total = sum(group.channels * span.times for _, group, span in members)
    if total <= length and not any(span.repeats for _, _, span in members):
        return [(g, span.times) for g, _, span in members], []
    numbers = list(dict.fromkeys(g for g, _, _ in members))
    owned = np.zeros((length, len(numbers)), bool)
    for g, group, span in members:
        owned[span.entries(np.arange(group.channels)), numbers.index(g)] = True
    patterns, counts = np.unique(owned[owned.any(1)], axis=0, return_counts=True)
    alone, shared = Counter(), Counter()
    for pattern, count in zip(patterns, counts.tolist(), strict=True):
        groups = tuple(numbers[row] for row in np.flatnonzero(pattern))
        (alone if len(groups) == 1 else shared)[groups] += count
    widths = {g: group.channels for g, group, _ in members}
    return [(g, number // widths[g]) for (g,), number in alone.items()], list(shared.items())
