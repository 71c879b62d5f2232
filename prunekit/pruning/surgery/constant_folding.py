"""What dead channels still say. A gate of zero leaves β, so a dead channel hands a constant to whatever reads it.

Where nothing pads the reader's input, the constant is a shift of the reader's output: it is folded, exactly, into the
running mean of the norm behind (no parameter is added, and in train mode that norm would have taken the shift out
anyway), or into a bias. Where the reader pads with zeros, the border sees another sum than the inside; there a
*carrier* is exact: one dead channel is kept, and each reader's weight for it is the sum of what the cut ones would
have given. Where no single one is other than zero at all of these readers (each may see another activation), there are
several.

What a transposed convolution makes of a constant differs from place to place as well, so it counts as one that pads.
A depthwise convolution that pads hands a constant on with a border of its own, for each channel another: no carrier
can stand for those, and nothing but giving such a channel back is exact. (That concerns a channel whose norm before
the depthwise convolution is dead and whose norm behind it is not; where that one is dead too, nothing comes through.)

The constants are measured at the readers on the model with its dead gates at zero, not derived: whatever stands
between a norm and a reader (activations, poolings, sums) is then right by itself, and a channel that is not constant
is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.pruning.graph.axes import conv_groups
from prunekit.pruning.graph.trace import TRANSPOSED
from prunekit.pruning.plan import Group, Member
from prunekit.pruning.surgery.cutter import entries, indices

# A dead channel that moves less than this between places and inputs, relative to its size, is a constant.
STEADY = 1e-9
# Below this a constant is not worth a carrier channel; it is dropped, and the equivalence check has the last word.
NEGLIGIBLE = 1e-9
# A carrier that is smaller than this share of the largest constant at a reader does not serve that reader.
COVERS = 1e-3


@dataclass
class FoldingReport:
    """What became of the constants.

    Attributes:
        folded: how many dead channels were folded.
        biases: those that modules are still to get, of all their channels, dead ones included.
        carriers: by group.
        inexact: for each reader that something is lost at, the most that its output moves by it (inside the image).
        lost: readers that were to get a bias and are gone.
    """

    folded: int = 0
    biases: dict[str, Tensor] = field(default_factory=dict)
    carriers: dict[str, list[int]] = field(default_factory=dict)
    inexact: dict[str, float] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)


@dataclass
class _Slot:
    """A module that reads dead channels, or one group of a convolution with groups: what sees the same weights.

    Attributes:
        name: of the module.
        rows: its outputs.
        chosen: which of the group's dead channels it reads.
        where: where they stand along the inputs of these rows.
        value, spread: of those channels there.
        stride: entries that a channel has.
        exact: whether a constant that is folded is the same everywhere.
    """

    name: str
    rows: slice
    chosen: np.ndarray
    where: np.ndarray
    value: np.ndarray
    spread: np.ndarray
    stride: int
    exact: bool

    def of(self, picked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places and values of some of ``chosen`` (a mask), entry by entry."""
        if self.stride == 1:
            return self.where[picked], self.value[picked]
        runs = self.where[picked][:, None] + np.arange(self.stride)
        return runs.ravel(), self.value[picked].repeat(self.stride)

    def loose(self, folded: bool) -> np.ndarray:
        """Which channels can be replaced neither by a fold nor (unless everything is ``folded``) by a carrier."""
        moving = self.spread > STEADY * np.maximum(np.abs(self.value), 1)
        return moving | (self.value != 0) if folded and not self.exact else moving


class ConstantFolder:
    """The constants of dead channels at the modules that read them.

    Args:
        model: the dense model in eval mode, its dead gates at zero; in float64, or the constants have float32's digits.
        groups: of that model.
        dead: dead channels by group.
        inputs: batches to measure on.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        dead: Mapping[str, Iterable[int]],
        inputs: Sequence[Tensor],
    ):
        self.model = model
        self.modules = dict(model.named_modules())
        self.groups = [group for group in groups if dead.get(group.id)]
        self.dead = {group.id: indices(dead[group.id]) for group in self.groups}
        self.readers: dict[str, list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.readers:
                self.readers.setdefault(member.tensor.removesuffix(".weight"), []).append((group, member))
        self.seen = self._measure(inputs)
        self.slots = {g.id: [slot for m in g.readers for slot in self._slots(g, m)] for g in self.groups}

    def _measure(self, inputs: Sequence[Tensor]) -> dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]]:
        """(reader, group, offset) → value of each dead channel there, and how far it varies."""
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}
        places = {
            name: np.concatenate([entries(member, self.dead[group.id]) for group, member in read])
            for name, read in self.readers.items()
        }

        def hook(name: str) -> Any:
            where = torch.from_numpy(places[name])

            def see(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                given = args[0] if args else next(iter(named.values()))
                axis = 1 if given.dim() > 1 else 0
                flat = given.index_select(axis, where.to(given.device)).transpose(0, axis).flatten(1)
                least, most = (flat[:, None] if flat.dim() == 1 else flat).aminmax(dim=1)
                low[name] = torch.minimum(low.get(name, least), least)
                high[name] = torch.maximum(high.get(name, most), most)

            return see

        hooks = [self.model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in self.readers]
        try:
            with torch.inference_mode():
                for batch in inputs:
                    self.model(batch)
        finally:
            for handle in hooks:
                handle.remove()
        found = {}
        for name, read in self.readers.items():
            at = 0
            for group, member in read:
                count = len(self.dead[group.id]) * member.stride
                found[name, group.id, member.offset] = self._span(low, high, name, slice(at, at + count), member.stride)
                at += count
        return found

    @staticmethod
    def _span(
        low: dict[str, Tensor], high: dict[str, Tensor], name: str, part: slice, stride: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if name not in low:  # never called
            return (np.zeros((part.stop - part.start) // stride),) * 2
        least = low[name][part].double().cpu().numpy().reshape(-1, stride).min(1)
        most = high[name][part].double().cpu().numpy().reshape(-1, stride).max(1)
        return (least + most) / 2, most - least

    def _slots(self, group: Group, member: Member) -> list[_Slot]:
        name = member.tensor.removesuffix(".weight")
        module = self.modules[name]
        value, spread = self.seen[name, group.id, member.offset]
        exact = not isinstance(module, TRANSPOSED) and not pads_zeros(module)
        return [
            _Slot(name, rows, chosen, where, value[chosen], spread[chosen], member.stride, exact)
            for rows, chosen, where in self._places(name, member, self.dead[group.id])
        ]

    def _places(self, name: str, member: Member, channels: np.ndarray) -> list[tuple[slice, np.ndarray, np.ndarray]]:
        """(rows, which of the channels these read, where) for each group of a convolution; one for all else."""
        module = self.modules[name]
        where = member.offset + channels * member.stride
        blocks = conv_groups(self.model, name) if getattr(module, "groups", 1) > 1 else 1
        if blocks == 1:
            return [(slice(None), np.arange(len(channels)), where)]
        rows, width = module.out_channels // blocks, module.in_channels // blocks
        found = []
        for block in np.unique(where // width).tolist():
            chosen = np.flatnonzero(where // width == block)
            found.append((slice(block * rows, (block + 1) * rows), chosen, where[chosen] - block * width))
        return found

    def inexact(self, carried: bool, gone: Collection[str] = ()) -> list[tuple[float, str, int]]:
        """Dead channels that neither a fold nor (with ``carried``) a carrier replaces exactly, largest first:
        (size of what is lost, group, channel).

        Args:
            gone: readers that will not be there to take a constant in.
        """

        def lost(slot: _Slot) -> np.ndarray:
            loose = slot.loose(not carried) | (slot.name in gone)
            return np.where(loose, np.abs(slot.value) + slot.spread, 0.0)

        return self._worst(lost, 0.0)

    def speaking(self) -> list[tuple[float, str, int]]:
        """Dead channels that some reader sees as anything but zero, as ``inexact`` lists them."""
        return self._worst(lambda slot: np.abs(slot.value) + slot.spread, NEGLIGIBLE)

    def _worst(self, size: Callable[[_Slot], np.ndarray], least: float) -> list[tuple[float, str, int]]:
        found = []
        for group in self.groups:
            worst = np.zeros(len(self.dead[group.id]))
            for slot in self.slots[group.id]:
                worst[slot.chosen] = np.maximum(worst[slot.chosen], size(slot))
            dead = self.dead[group.id].tolist()
            found += [(w, group.id, k) for w, k in zip(worst.tolist(), dead, strict=True) if w > least]
        return sorted(found, key=lambda item: (-item[0], item[1], item[2]))

    def losses(self, carried: bool, dropped: bool = False) -> dict[str, float]:
        """For each reader at which the constants are not replaced exactly, the most that its output moves if they are
        cut all the same."""
        found: dict[str, float] = {}
        for slots in self.slots.values():
            for slot in slots:
                loose = slot.loose(not carried) | (dropped & (np.abs(slot.value) > NEGLIGIBLE))
                if loose.any():
                    size = float(self._moves(slot.name, slot.rows, *slot.of(loose)).abs().max())
                    found[slot.name] = max(found.get(slot.name, 0.0), size)
        return found

    def fold(self, carry: bool) -> FoldingReport:
        """Put the constants into the readers, in place: folds everywhere, carriers (with ``carry``) where readers pad.

        The dead channels can be cut afterwards, but for the carriers; and after that the biases can be added. Those
        that stay all the same must be silenced.
        """
        report = FoldingReport()
        moved: dict[tuple[str, int], list[tuple[slice, np.ndarray, np.ndarray]]] = {}
        for group in self.groups:
            slots = self.slots[group.id]
            carriers = self._carriers(slots, len(self.dead[group.id])) if carry else []
            if carriers:
                report.carriers[group.id] = sorted(int(self.dead[group.id][k]) for k in carriers)
            folded = False
            for slot in slots:
                # What the cut channels gave is put on the carrier where the reader pads; elsewhere they are folded, and
                # the carrier goes on giving its own.
                carrying = np.isin(slot.chosen, carriers) if carriers else np.zeros(len(slot.chosen), bool)
                where, value = slot.of(~carrying)
                if not len(where):
                    continue
                if carrying.any() and self._needs_carrier(slot):
                    carrier = int(np.where(carrying, np.abs(slot.value), -1.0).argmax())
                    weight = self._weight(slot.name)[slot.rows]
                    ratio = _row(weight, where, value / slot.value[carrier])
                    gift = (ratio.expand(len(weight), 1, -1) @ weight.flatten(2))[:, 0]
                    weight[:, slot.where[carrier]] += gift.view_as(weight[:, 0])
                else:
                    moved.setdefault((slot.name, slot.rows.start or 0), []).append((slot.rows, where, value))
                    folded |= bool(value.any())
            report.folded += folded * len(self.dead[group.id])
        shifts: dict[str, Tensor] = {}
        for (name, _), parts in moved.items():
            # All channels of a reader at once: in a dense network it reads those of hundreds of groups.
            rows, where, value = parts[0][0], *(np.concatenate([part[i] for part in parts]) for i in (1, 2))
            if value.any():
                whole = self._weight(name)
                shift = shifts.setdefault(name, whole.new_zeros(len(whole)))
                shift[rows] += self._moves(name, rows, where, value)
        for name, shift in shifts.items():
            self._shift(name, shift, report)
        return report

    def silence(self, dead: Mapping[str, Iterable[int]]) -> None:
        """Let channels whose constants have been replaced, and that stay, add nothing any more."""
        for name, read in self.readers.items():
            for group, member in read:
                staying = indices(dead.get(group.id, ()))
                for rows, _, where in self._places(name, member, staying) if len(staying) else ():
                    runs = where[:, None] + np.arange(member.stride)
                    self._weight(name)[rows][:, torch.from_numpy(runs.ravel())] = 0

    def _needs_carrier(self, slot: _Slot) -> bool:
        return not slot.exact and slot.stride == 1 and float(np.abs(slot.value).max()) > NEGLIGIBLE

    def _weight(self, name: str) -> Tensor:
        """A reader's weight, outputs first: a view."""
        module = self.modules[name]
        return module.weight.data.transpose(0, 1) if isinstance(module, TRANSPOSED) else module.weight.data

    def _moves(self, name: str, rows: slice, where: np.ndarray, value: np.ndarray) -> Tensor:
        """What inputs of these constant values add to the outputs."""
        weight = self._weight(name)[rows]
        row = _row(weight, where, value)
        return (row @ weight.flatten(2)).sum(1) if weight.dim() > 2 else weight @ row

    def _shift(self, name: str, shift: Tensor, report: FoldingReport) -> None:
        """Add ``shift`` to what a reader puts out."""
        module = self.modules[name]
        into = self.readers[name][0][1].into
        if into is not None:
            self.modules[into].running_mean -= shift
        elif module.bias is not None:
            module.bias.data += shift
        else:
            report.biases[name] = shift

    def _carriers(self, slots: Sequence[_Slot], count: int) -> list[int]:
        """Which of the dead channels (as indices into them) carry the constants to readers that pad: as few as make
        each of these readers see one that is not zero there."""
        padded = [slot for slot in slots if self._needs_carrier(slot)]
        size = np.zeros((len(padded), count))
        for row, slot in zip(size, padded, strict=True):
            row[slot.chosen] = np.abs(slot.value)
        chosen: list[int] = []
        while len(size):
            seen = size > np.maximum(COVERS * size.max(1, keepdims=True), NEGLIGIBLE)
            covered = seen.sum(0)
            # Among the best the largest, so that ratios stay small and rounding where it was.
            least = np.where(seen, size, np.inf).min(0)
            best = int(np.where(covered == covered.max(), least, -1.0).argmax())
            chosen.append(best)
            size = size[~seen[:, best]]
        return chosen


def _row(weight: Tensor, where: np.ndarray, value: np.ndarray) -> Tensor:
    """A value for each input of a weight, zero but at these places."""
    row = np.zeros(weight.shape[1])
    row[where] = value
    return torch.from_numpy(row).to(weight)


def pads_zeros(module: nn.Module) -> bool:
    """Whether this module sees zeros beside its input."""
    padding = getattr(module, "padding", 0)
    if getattr(module, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(k > 1 for k in module.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)
