"""The size that a slim model would have, known without building it: for a search over plans, and for every few steps of
a training.

A channel that goes takes an entry of each axis of its group along. So the lengths of all axes are linear in the number
of dead channels of each group, a tensor is the product of its axes, and multiply-adds are a constant (the positions at
which a kernel stands, which no cut changes) times the tensor. Which channels are dead does not matter, only how many.
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
    """What is left of a model when channels go.

    Args:
        model: the dense model.
        groups: of that model.
        shape: of one input without the batch, (C, H, W) or (C,).

    Attributes:
        dense: the size of the model as it is.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], shape: Sequence[int]):
        counts, _ = count_modules(model, tuple(shape))
        self._cutter = cutter = Cutter(model, groups)
        self.groups = list(groups)
        self._free = np.array([group.reason is None for group in groups], bool)
        self._width = np.array([group.channels for group in groups], np.int64)
        rows = {axis: row for row, axis in enumerate(cutter.lengths)}
        names = {name: place for place, name in enumerate(counts)}
        for tensor, _ in rows:  # a norm without γ and β has no parameters, and can be the last of a module to go
            names.setdefault(tensor.rpartition(".")[0], len(names))
        self._length = np.array(list(cutter.lengths.values()), np.int64)
        self._module = np.array([names[tensor.rpartition(".")[0]] for tensor, _ in rows], np.int64)
        self._modules = len(names)
        taken = [(rows[m.tensor, m.axis], g, m.stride) for g, group in enumerate(groups) for m in group.members]
        self._taken = _matrix(taken, (len(rows), len(groups)))
        makers = {
            (g, names[n], 1) for g, group in enumerate(groups) for n in group.producers if not is_channelwise(model, n)
        }
        readers = {(g, names[m.tensor.rpartition(".")[0]], 1) for g, group in enumerate(groups) for m in group.readers}
        self._needs = [_matrix(sorted(pairs), (len(groups), len(names))) for pairs in (makers, readers)]
        self._needed = [np.asarray(need.sum(1)).ravel() for need in self._needs]

        # Each parameter: what of it no cut changes, and the rows of up to two axes that a cut does (the row behind
        # the last stands for an axis of length 1).
        rest, axes, shared, owner, positions = [], [], [], [], []
        for name, place in names.items():
            for key, tensor in model.get_submodule(name)._parameters.items():
                if tensor is None:
                    continue
                cut = [axis for axis in range(tensor.dim()) if (f"{name}.{key}", axis) in rows]
                rest.append(math.prod(length for axis, length in enumerate(tensor.shape) if axis not in cut))
                mine = [rows[f"{name}.{key}", axis] for axis in cut]
                axes.append([*mine, *[len(rows)] * (2 - len(mine))])
                # The input axis of a convolution with groups is as long as that of all its groups together.
                shared.append(conv_groups(model, name) if key == "weight" and len(mine) == 2 else 1)
                owner.append(place)
                macs = counts[name].macs if key == "weight" else 0
                positions.append(macs // tensor.numel() if macs else 0)
        self._rest = np.array(rest, np.int64)
        self._axes = np.array(axes, np.int64).reshape(-1, 2)
        self._shared = np.array(shared, np.int64)
        self._owner = np.array(owner, np.int64)
        self._positions = np.array(positions, np.int64)
        self.dense = self.of({})

    def of(self, dead: Mapping[str, Collection[int] | int]) -> ModelSize:
        """The size without these channels, and without what cannot live without them.

        Args:
            dead: for a group's id its dead channels, or how many there are. (Where the model has convolutions with
                groups, which must stay of one size, numbers are right only if they are what ``Cutter.complete`` leaves.)
        """
        if self._cutter.blocks and not any(isinstance(channels, int) for channels in dead.values()):
            dead, _ = self._cutter.complete(dead)
        numbers = [dead.get(group.id, 0) for group in self.groups]
        kept, gone = self._settle(np.array([n if isinstance(n, int) else len(n) for n in numbers], np.int64))
        one = np.append(kept, 1)
        sizes = self._rest * one[self._axes[:, 0]] * one[self._axes[:, 1]] // self._shared
        sizes[gone[self._owner]] = 0
        return ModelSize(int(sizes.sum()), int(sizes @ self._positions))

    def _settle(self, dead: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Cutter.complete``, by numbers: the length left of each axis, and the modules of which nothing is left."""
        while True:
            kept = self._length - self._taken @ dead
            gone = np.zeros(self._modules, bool)
            gone[self._module[kept == 0]] = True
            lost = np.zeros(len(dead), bool)
            for need, needed in zip(self._needs, self._needed, strict=True):
                lost |= (needed > 0) & (need @ gone.astype(np.int64) == needed)
            lost &= self._free & (dead < self._width)
            if not lost.any():
                return kept, gone
            dead = np.where(lost, self._width, dead)


def _matrix(entries: list[tuple[int, int, int]], shape: tuple[int, int]) -> csr_matrix:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((np.array(values, np.int64), (rows, columns)), shape)
