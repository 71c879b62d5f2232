"""The size of a slim model, predicted without building it.

Pruning a channel removes an entry from each axis of its group. So the length of every axis is linear in the number of
dead channels of each group, the size of a tensor is the product of its axes, and its multiply-adds are that size times
the number of positions of the kernel, which pruning does not change. Which channels are dead does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.sparse import csr_matrix
from torch import nn

from prunekit.flops import count_modules
from prunekit.pruning.graph.axes import conv_groups, is_channelwise
from prunekit.pruning.plan import Group
from prunekit.pruning.surgery.cutter import Cutter


@dataclass(frozen=True)
class ModelSize:
    """Parameters, and multiply-adds at the shape asked for (a multiply-add is 1, see ``prunekit.flops``)."""

    params: int
    macs: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class SizeModel:
    """Predicts the size of a model without some of its channels.

    Args:
        shape: of one input without the batch, (C, H, W) or (C,).

    Attributes:
        dense: the size of the dense model.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], shape: Sequence[int]):
        counts, _ = count_modules(model, tuple(shape))
        self._cutter = cutter = Cutter(model, groups)
        self.groups = list(groups)
        self._prunable = np.array([group.reason is None for group in groups], bool)
        self._width = np.array([group.channels for group in groups], np.int64)
        rows = {axis: row for row, axis in enumerate(cutter.lengths)}
        modules = {name: index for index, name in enumerate(counts)}
        for tensor, _ in rows:  # a norm without γ and β has no parameters, but can be the last one to be removed
            modules.setdefault(tensor.rpartition(".")[0], len(modules))
        self._length = np.array(list(cutter.lengths.values()), np.int64)
        self._module = np.array([modules[tensor.rpartition(".")[0]] for tensor, _ in rows], np.int64)
        self._module_count = len(modules)
        strides = [(rows[m.tensor, m.axis], g, m.stride) for g, group in enumerate(groups) for m in group.members]
        self._strides = _matrix(strides, (len(rows), len(groups)))
        # The modules that produce, and those that read, each group's channels.
        producers, readers = set(), set()
        for g, group in enumerate(groups):
            producers |= {(g, modules[name], 1) for name in group.producers if not is_channelwise(model, name)}
            readers |= {(g, modules[member.module], 1) for member in group.readers}
        self._needs = [_matrix(sorted(pairs), (len(groups), len(modules))) for pairs in (producers, readers)]
        self._need_counts = [np.asarray(need.sum(1)).ravel() for need in self._needs]

        # For each parameter: its size along the axes that are never pruned, the rows of up to two that are (the row
        # after the last is an axis of length 1), the groups that share its input axis, its module, and its positions.
        table = []
        for name, index in modules.items():
            for key, parameter in model.get_submodule(name)._parameters.items():
                if parameter is None:
                    continue
                pruned = [axis for axis in range(parameter.dim()) if (f"{name}.{key}", axis) in rows]
                fixed = math.prod(length for axis, length in enumerate(parameter.shape) if axis not in pruned)
                axes = [*(rows[f"{name}.{key}", axis] for axis in pruned), *[len(rows)] * (2 - len(pruned))]
                # The input axis of a convolution with groups is counted over all of its groups.
                shared = conv_groups(model, name) if key == "weight" and len(pruned) == 2 else 1
                positions = counts[name].macs // parameter.numel() if key == "weight" and counts[name].macs else 0
                table.append((fixed, *axes, shared, index, positions))
        columns = np.array(table, np.int64).reshape(-1, 6).T.copy()
        self._fixed, self._axes, self._shared, self._owner, self._positions = columns[0], columns[1:3], *columns[3:]
        self.dense = self.size_without({})

    def size_without(self, dead: Mapping[str, Collection[int] | int]) -> ModelSize:
        """Return the size without some channels, and without what cannot live without them.

        Args:
            dead: for the ids of groups their dead channels, or how many there are. With convolutions with groups,
                numbers are exact only if they are what ``Cutter.complete`` leaves.
        """
        channels = {name: value for name, value in dead.items() if not isinstance(value, int)}
        if self._cutter.blocks and len(channels) == len(dead):
            dead, _ = self._cutter.complete(channels)
        values = [dead.get(group.id, 0) for group in self.groups]
        kept, gone = self._complete(np.array([n if isinstance(n, int) else len(n) for n in values], np.int64))
        lengths = np.append(kept, 1)
        sizes = self._fixed * lengths[self._axes].prod(0) // self._shared
        sizes[gone[self._owner]] = 0
        return ModelSize(int(sizes.sum()), int(sizes @ self._positions))

    def _complete(self, dead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Cutter.complete``, with counts: the remaining length of each axis, and the modules that are gone."""
        while True:
            kept = self._length - self._strides @ dead
            gone = np.zeros(self._module_count, bool)
            gone[self._module[kept == 0]] = True
            lost = np.zeros(len(dead), bool)
            for need, count in zip(self._needs, self._need_counts, strict=True):
                lost |= (count > 0) & (need @ gone.astype(np.int64) == count)
            lost &= self._prunable & (dead < self._width)
            if not lost.any():
                return kept, gone
            dead = np.where(lost, self._width, dead)


def _matrix(entries: list[tuple[int, int, int]], shape: tuple[int, int]) -> csr_matrix:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((np.array(values, np.int64), (rows, columns)), shape)
