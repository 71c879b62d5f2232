"""What dead channels still say. A gate of zero leaves β, so a dead channel hands a constant to whatever reads it.

Where nothing pads the reader's input, the constant is a shift of the reader's output: it is folded, exactly, into the
running mean of the norm behind (no parameter is added, and in train mode that norm would have taken the shift out
anyway), or into a bias. Where the reader pads with zeros, the border sees another sum than the inside; there a
*carrier* is exact: one dead channel is kept, and each reader's weight for it is the sum of what the cut ones would
have given. Where no single one is other than zero at all of these readers (each may see another activation), there are
several.

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

from prunekit.plan import Group
from prunekit.pruning.graph import LINEAR_OPS, follow, trace
from prunekit.pruning.surgery import entries

# Below this a constant is not worth a carrier channel; it is dropped, and the proof has the last word.
NEGLIGIBLE = 1e-9
# A carrier that is smaller than this share of the largest constant at a reader does not serve that reader.
COVERS = 1e-3


@dataclass
class Report:
    """What became of the constants: how many dead channels were folded, the biases that modules are still to get (of
    all their channels, dead ones included), and the carriers by group."""

    folded: int = 0
    biases: dict[str, Tensor] = field(default_factory=dict)
    carriers: dict[str, list[int]] = field(default_factory=dict)


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
        self.example = inputs[0]
        self.groups = [group for group in groups if dead.get(group.id)]
        self.dead = {group.id: torch.tensor(sorted(dead[group.id])) for group in self.groups}
        self.readers = {m.tensor.removesuffix(".weight") for group in self.groups for m in group.readers}
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
            for member in group.readers:
                name = member.tensor.removesuffix(".weight")
                value, spread = self._at(name, member, dead)
                loose = spread > 1e-9 * value.abs().clamp(min=1)
                if pads_zeros(self.model.get_submodule(name)) and not carried:
                    loose |= value != 0
                worst = torch.maximum(worst, torch.where(loose, value.abs() + spread, 0.0))
            found += [(float(w), group.id, int(k)) for w, k in zip(worst, dead, strict=True) if w > 0]
        return sorted(found, key=lambda item: (-item[0], item[1], item[2]))

    def fold(self, carry: bool) -> Report:
        """Put the constants into the readers, in place: folds everywhere, carriers (with ``carry``) where readers pad.

        The dead channels can be cut afterwards, but for the carriers; and after that the biases can be added.
        """
        report = Report()
        # Two images: a norm without running statistics takes no single one.
        graph = trace(self.model, self.example[:2])
        after = graph.by_name()
        shifts: dict[str, Tensor] = {}
        for group in self.groups:
            dead = self.dead[group.id]
            carriers = self._carriers(group) if carry else []
            if carriers:
                report.carriers[group.id] = sorted(int(dead[k]) for k in carriers)
            moved = False
            for member in group.readers:
                name = member.tensor.removesuffix(".weight")
                module = self.model.get_submodule(name)
                value, _ = self._at(name, member, dead)
                where = entries(member, dead)
                value = value.repeat_interleave(member.stride)
                weight = module.weight.detach()
                if carriers:
                    # What the cut channels gave is put on the carrier where the reader pads; elsewhere they are folded,
                    # and the carrier goes on giving its own.
                    cut = torch.ones(len(where), dtype=torch.bool)
                    runs = torch.tensor(carriers)[:, None] * member.stride + torch.arange(member.stride)
                    cut[runs.flatten()] = False
                    if pads_zeros(module) and member.stride == 1 and value.abs().max() > NEGLIGIBLE:
                        carrier = max(carriers, key=lambda k, value=value: float(value[k].abs()))
                        ratio = value[cut] / value[carrier]
                        weight[:, where[carrier]] += torch.einsum("ok...,k->o...", weight[:, where[cut]], ratio)
                        continue
                    where, value = where[cut], value[cut]
                if not len(where) or not value.any():
                    continue
                taken = weight[:, where].flatten(2).sum(2) if weight.dim() > 2 else weight[:, where]
                shifts[name] = shifts.get(name, 0) + taken @ value
                moved = True
            report.folded += moved * len(dead)
        for name, shift in shifts.items():
            self._shift(after[name], shift, report, graph.reused)
        return report

    def _shift(self, node: Any, shift: Tensor, report: Report, reused: set[str]) -> None:
        """Add ``shift`` to what a reader puts out."""
        norm = follow(node, LINEAR_OPS)
        own = norm is not None and norm.op == "norm" and norm.name not in reused
        if own and norm.module.running_mean is not None:
            norm.module.running_mean -= shift
        elif node.module.bias is not None:
            node.module.bias.data += shift
        else:
            report.biases[node.name] = shift

    def _carriers(self, group: Group) -> list[int]:
        """Which of the dead channels (as indices into them) carry the constants to readers that pad: as few as make
        each of these readers see one that is not zero there."""
        padded = []
        for member in group.readers:
            name = member.tensor.removesuffix(".weight")
            if pads_zeros(self.model.get_submodule(name)) and member.stride == 1:
                padded.append(self._at(name, member, self.dead[group.id])[0].abs())
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

    def _at(self, name: str, member: Any, dead: Tensor) -> tuple[Tensor, Tensor]:
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
