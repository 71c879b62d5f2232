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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.plan import Group, Member
from prunekit.pruning.axes import groups_of
from prunekit.pruning.graph import TRANSPOSED
from prunekit.pruning.surgery import entries

# A dead channel that moves less than this between places and inputs, relative to its size, is a constant.
STEADY = 1e-9
# Below this a constant is not worth a carrier channel; it is dropped, and the proof has the last word.
NEGLIGIBLE = 1e-9
# A carrier that is smaller than this share of the largest constant at a reader does not serve that reader.
COVERS = 1e-3


@dataclass
class Report:
    """What became of the constants.

    Attributes:
        folded: how many dead channels were folded.
        biases: those that modules are still to get, of all their channels, dead ones included.
        carriers: by group.
        inexact: for each reader that something is lost at, the most that its output moves by it (inside the image).
    """

    folded: int = 0
    biases: dict[str, Tensor] = field(default_factory=dict)
    carriers: dict[str, list[int]] = field(default_factory=dict)
    inexact: dict[str, float] = field(default_factory=dict)


@dataclass
class _Slot:
    """A module that reads dead channels, or one group of a convolution with groups: what sees the same weights.

    Attributes:
        rows: its outputs.
        weight: of these rows, a view, (rows, inputs, …).
        chosen: which of the dead channels it reads.
        where: where they stand along its inputs.
        value, spread: of those channels there.
        exact: whether a constant that is folded is the same everywhere.
    """

    name: str
    rows: slice
    weight: Tensor
    chosen: Tensor
    where: Tensor
    value: Tensor
    spread: Tensor
    stride: int
    exact: bool

    def of(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """Places and values of some of ``chosen`` (a mask), entry by entry."""
        runs = self.where[picked][:, None] + torch.arange(self.stride)
        return runs.flatten(), self.value[picked].repeat_interleave(self.stride)

    def shift(self, picked: Tensor) -> Tensor:
        """What these channels add to the outputs."""
        where, value = self.of(picked)
        taken = self.weight[:, where]
        return (taken.flatten(2).sum(2) if taken.dim() > 2 else taken) @ value


class Constants:
    """The constants of dead channels at the modules that read them.

    Args:
        model: the dense model in float64 and eval mode, its dead gates at zero.
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
        self.groups = [group for group in groups if dead.get(group.id)]
        self.dead = {group.id: torch.tensor(sorted(dead[group.id])) for group in self.groups}
        self.readers = {m.tensor.removesuffix(".weight") for group in self.groups for m in group.readers}
        self.into = {
            m.tensor.removesuffix(".weight"): m.into for group in self.groups for m in group.readers if m.into
        }
        self.low, self.high = self._measure(inputs)

    def _measure(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def see(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                given = args[0] if args else next(iter(named.values()))
                flat = given.transpose(0, 1).flatten(1) if given.dim() > 1 else given[:, None]
                low[name] = torch.minimum(low.get(name, flat.amin(1)), flat.amin(1))
                high[name] = torch.maximum(high.get(name, flat.amax(1)), flat.amax(1))

            return see

        hooks = [
            self.model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True)
            for n in sorted(self.readers)
        ]
        try:
            with torch.inference_mode():
                for batch in inputs:
                    self.model(batch)
        finally:
            for handle in hooks:
                handle.remove()
        return {k: v.clone() for k, v in low.items()}, {k: v.clone() for k, v in high.items()}

    def inexact(self, carried: bool) -> list[tuple[float, str, int]]:
        """Dead channels that neither a fold nor (with ``carried``) a carrier replaces exactly, largest first:
        (size of what is lost, group, channel)."""
        found = []
        for group in self.groups:
            dead = self.dead[group.id]
            worst = torch.zeros(len(dead), dtype=torch.float64)
            for slot in self._slots(group):
                loose = slot.spread > STEADY * slot.value.abs().clamp(min=1)
                if not slot.exact and not carried:
                    loose |= slot.value != 0
                lost = torch.where(loose, slot.value.abs() + slot.spread, 0.0)
                worst[slot.chosen] = torch.maximum(worst[slot.chosen], lost)
            found += [(float(w), group.id, int(k)) for w, k in zip(worst, dead, strict=True) if w > 0]
        return sorted(found, key=lambda item: (-item[0], item[1], item[2]))

    def speaking(self) -> list[tuple[float, str, int]]:
        """Dead channels that some reader sees as anything but zero, as ``inexact`` lists them."""
        found = []
        for group in self.groups:
            size = torch.zeros(len(self.dead[group.id]), dtype=torch.float64)
            for slot in self._slots(group):
                size[slot.chosen] = torch.maximum(size[slot.chosen], slot.value.abs() + slot.spread)
            found += [
                (float(w), group.id, int(k))
                for w, k in zip(size, self.dead[group.id], strict=True)
                if w > NEGLIGIBLE
            ]
        return found

    def losses(self, carried: bool, dropped: bool = False) -> dict[str, float]:
        """For each reader at which the constants are not replaced exactly, the most that its output moves if they are
        cut all the same."""
        found: dict[str, float] = {}
        for group in self.groups:
            for slot in self._slots(group):
                loose = slot.spread > STEADY * slot.value.abs().clamp(min=1)
                if dropped or (not slot.exact and not carried):
                    loose |= slot.value.abs() > NEGLIGIBLE
                if loose.any():
                    size = float(slot.shift(loose).abs().max())
                    found[slot.name] = max(found.get(slot.name, 0.0), size)
        return found

    def fold(self, carry: bool) -> Report:
        """Put the constants into the readers, in place: folds everywhere, carriers (with ``carry``) where readers pad.

        The dead channels can be cut afterwards, but for the carriers; and after that the biases can be added. One that
        stays all the same adds nothing any more.
        """
        report = Report()
        shifts: dict[str, Tensor] = {}
        for group in self.groups:
            slots = self._slots(group)
            carriers = self._carriers(slots) if carry else []
            if carriers:
                report.carriers[group.id] = sorted(int(self.dead[group.id][k]) for k in carriers)
            moved = False
            for slot in slots:
                # What the cut channels gave is put on the carrier where the reader pads; elsewhere they are folded, and
                # the carrier goes on giving its own.
                carrying = torch.isin(slot.chosen, torch.tensor(carriers, dtype=torch.long))
                where, value = slot.of(~carrying)
                if not len(where):
                    continue
                size = slot.value.abs()
                if carrying.any() and not slot.exact and slot.stride == 1 and float(size.max()) > NEGLIGIBLE:
                    carrier = int(torch.where(carrying, size, -1.0).argmax())
                    ratio = value / slot.value[carrier]
                    gift = torch.einsum("ok...,k->o...", slot.weight[:, where], ratio)
                    slot.weight[:, slot.where[carrier]] += gift
                elif value.any():
                    if slot.name not in shifts:
                        shifts[slot.name] = torch.zeros(self._outputs(slot.name), dtype=torch.float64)
                    shifts[slot.name][slot.rows] += slot.shift(~carrying)
                    moved = True
                slot.weight[:, where] = 0
            report.folded += moved * len(self.dead[group.id])
        for name, shift in shifts.items():
            self._shift(name, shift, report)
        return report

    def _outputs(self, name: str) -> int:
        module = self.model.get_submodule(name)
        return getattr(module, "out_channels", None) or module.out_features

    def _shift(self, name: str, shift: Tensor, report: Report) -> None:
        """Add ``shift`` to what a reader puts out."""
        module = self.model.get_submodule(name)
        norm = self.into.get(name)
        if norm is not None:
            self.model.get_submodule(norm).running_mean -= shift
        elif module.bias is not None:
            module.bias.data += shift
        else:
            report.biases[name] = shift

    def _carriers(self, slots: Sequence[_Slot]) -> list[int]:
        """Which of the dead channels (as indices into them) carry the constants to readers that pad: as few as make
        each of these readers see one that is not zero there."""
        padded = []
        for slot in slots:
            if not slot.exact and slot.stride == 1:
                seen = torch.zeros(int(max(s.chosen.max() for s in slots)) + 1, dtype=torch.float64)
                seen[slot.chosen] = slot.value.abs()
                padded.append(seen)
        if not padded:
            return []
        size = torch.stack(padded)
        size = size[size.amax(1) > NEGLIGIBLE]
        chosen: list[int] = []
        while len(size):
            seen = size > (COVERS * size.amax(1, keepdim=True)).clamp(min=NEGLIGIBLE)
            covered = seen.sum(0)
            # Among the best the largest, so that ratios stay small and rounding where it was.
            least = torch.where(seen, size, torch.inf).amin(0)
            best = int(torch.where(covered == covered.max(), least, -1.0).argmax())
            chosen.append(best)
            size = size[~seen[:, best]]
        return chosen

    def _slots(self, group: Group) -> list[_Slot]:
        return [slot for member in group.readers for slot in self._slots_of(member, self.dead[group.id])]

    def _slots_of(self, member: Member, dead: Tensor) -> list[_Slot]:
        name = member.tensor.removesuffix(".weight")
        module = self.model.get_submodule(name)
        turned = isinstance(module, TRANSPOSED)
        weight = module.weight.detach()
        weight = weight.transpose(0, 1) if turned else weight
        where = member.offset + dead * member.stride
        value, spread = self._at(name, member, dead)
        exact = not turned and not pads_zeros(module)
        blocks = groups_of(self.model, name)
        if blocks == 1:
            everything = torch.arange(len(dead))
            return [_Slot(name, slice(None), weight, everything, where, value, spread, member.stride, exact)]
        rows, width = len(weight) // blocks, weight.shape[1]
        found = []
        for block in (where // width).unique().tolist():
            chosen = (where // width == block).nonzero().flatten()
            span = slice(block * rows, (block + 1) * rows)
            at = where[chosen] - block * width
            found.append(
                _Slot(name, span, weight[span], chosen, at, value[chosen], spread[chosen], member.stride, exact)
            )
        return found

    def _at(self, name: str, member: Member, dead: Tensor) -> tuple[Tensor, Tensor]:
        """The channels' value at this reader, and how far it varies."""
        if name not in self.low:  # never called
            return torch.zeros(len(dead), dtype=torch.float64), torch.zeros(len(dead), dtype=torch.float64)
        where = entries(member, dead)
        low, high = self.low[name][where], self.high[name][where]
        if member.stride > 1:
            low, high = low.view(-1, member.stride).amin(1), high.view(-1, member.stride).amax(1)
        return (low + high) / 2, high - low


def pads_zeros(module: nn.Module) -> bool:
    """Whether this module sees zeros beside its input."""
    padding = getattr(module, "padding", 0)
    if getattr(module, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(k > 1 for k in module.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)
