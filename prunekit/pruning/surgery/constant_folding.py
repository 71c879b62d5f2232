"""Constant folding: the mean response of dead channels is moved into the modules that read them (mean replacement,
Evci et al., 2018).

Three steps: ``measure_constants``, ``plan_folding``, ``apply_folding``. See docs/design/surgery.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.pruning.graph.axes import TRANSPOSED, conv_groups
from prunekit.pruning.graph.slicing import channel_index
from prunekit.pruning.plan import Group, Member
from prunekit.pruning.surgery.equivalence import outputs_of
from prunekit.utils.inputs import Example

CONSTANT_TOLERANCE = 1e-9  # a channel whose values differ by less than this, relative to their size, is constant
NEGLIGIBLE = 1e-9  # a smaller constant is dropped instead of carried; the equivalence check decides if that is allowed
MIN_CARRIER_RATIO = 1e-3  # least size of a carrier, relative to the largest constant at the reader


@dataclass
class ConstantInput:
    """The dead channels of a group as one reader, or one group of a grouped convolution, sees them."""

    module: nn.Module  # the reader
    member: Member  # its input axis
    rows: slice  # its output channels
    index: np.ndarray  # which of the group's dead channels are read, (channels,)
    offset: np.ndarray  # where each starts along the input axis of these rows, (channels,)
    value: np.ndarray  # mean of each entry of each channel, (channels, stride)
    spread: np.ndarray  # width of its range, (channels, stride)

    @property
    def size(self) -> np.ndarray:
        return (np.abs(self.value) + self.spread).max(1)

    @property
    def uniform(self) -> bool:
        """Whether a constant input shifts all positions of the output equally."""
        return not self.member.pads

    @property
    def needs_carrier(self) -> bool:
        return not self.uniform and self.member.stride == 1 and float(np.abs(self.value).max()) > NEGLIGIBLE

    @property
    def inexact(self) -> np.ndarray:
        """Mask of the channels that neither a fold nor a carrier replaces exactly, (channels,)."""
        varies = self.spread > CONSTANT_TOLERANCE * np.maximum(np.abs(self.value), 1)
        if not self.uniform and self.member.stride > 1:
            varies |= np.abs(self.value) > NEGLIGIBLE  # a channel with several entries carries none
        return varies.any(1)

    def entries(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The input entries of some channels, and the value of each entry."""
        runs = self.offset[mask][:, None] + np.arange(self.member.stride)
        return runs.ravel(), self.value[mask].ravel()


@dataclass
class Constants:
    """The measured constants of dead channels, by group."""

    dead: dict[str, np.ndarray]  # the dead channels
    inputs: dict[str, list[ConstantInput]]  # where they are read
    means: dict[str, np.ndarray]  # of all entries of the axis of channels at the inputs of these readers
    outputs: list[Tensor]  # of the model, on the first batch

    def inexact(self, lost: Collection[str]) -> list[tuple[float, str, int]]:
        """Dead channels that cannot be replaced exactly, or whose reader is ``lost``: (size, group, channel), largest
        first."""
        found = []
        for name, dead in self.dead.items():
            largest = np.zeros(len(dead))
            for constant in self.inputs[name]:
                size = np.where(constant.inexact | (constant.member.module in lost), constant.size, 0.0)
                largest[constant.index] = np.maximum(largest[constant.index], size)
            found += [(s, name, k) for s, k in zip(largest.tolist(), dead.tolist(), strict=True) if s > 0]
        return sorted(found, key=lambda item: (-item[0], item[1], item[2]))

    def output_shifts(self) -> dict[str, float]:
        """How far the inexact channels would move the output of each reader."""
        shifts: dict[str, float] = {}
        for constant in (c for inputs in self.inputs.values() for c in inputs):
            if constant.inexact.any():
                shift = _output_shift(constant.module, constant.rows, *constant.entries(constant.inexact))
                name = constant.member.module
                shifts[name] = max(shifts.get(name, 0.0), float(shift.abs().max()))
        return shifts


def measure_constants(
    model: nn.Module,
    groups: Sequence[Group],
    dead: Mapping[str, Collection[int]],
    inputs: Sequence[Example],
    runner: nn.Module | None = None,
    source: nn.Module | None = None,
    ranges: bool = True,
) -> Constants:
    """Run a model, in eval mode, and measure what dead channels emit at their readers: the mean and the range.

    Args:
        ranges: whether to measure them; else they are taken to be zero.
        runner: calls the model's modules in its place, such as one that masks statistics.
        source: a copy that is measured in the model's place, such as one in another precision.
    """
    indices = {group.id: channel_index(dead[group.id]) for group in groups if dead.get(group.id)}
    # What is zero has no constant.
    found = [group for group in groups if group.id in indices and not group.zeroed]
    members = [(group.id, member) for group in found for member in group.readers]
    source = source or model
    names = {member.module for _, member in members}
    measured, outputs = _input_statistics(source, runner or source, names, inputs, ranges)
    constants = Constants(indices, defaultdict(list), {name: means for name, (means, _) in measured.items()}, outputs)
    for group, member in members:
        channels, module = constants.dead[group], model.get_submodule(member.module)
        value = spread = np.zeros((len(channels), member.stride))
        if member.module in measured:  # else it is never called
            means, ranges = measured[member.module]
            value, spread = (x[member.entries(channels)].reshape(-1, member.stride) for x in (means, ranges))
        constants.inputs[group] += [
            ConstantInput(module, member, rows, index, offset, value[index], spread[index])
            for rows, index, offset in _read_by(model, member, channels)
        ]
    return constants


def _input_statistics(
    model: nn.Module, runner: nn.Module, names: Collection[str], inputs: Sequence[Example], ranges: bool
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[Tensor]]:
    """The mean and the width of the range of each entry of the axis of channels (the last of a linear layer, else the
    second) at the inputs of modules, over some batches; and the model's outputs on the first."""
    modules = {model.get_submodule(name): name for name in names}
    found: dict[str, list[Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        own = given.dim() - 1 if isinstance(module, nn.Linear) else 1
        axes = [axis for axis in range(given.dim()) if axis != own]
        number = torch.tensor(given.numel() / given.shape[own])
        total = given.sum(axes)
        low, high = (given.amin(axes), given.amax(axes)) if ranges else [torch.zeros_like(total)] * 2
        before = found.get(modules[module], [low, high, torch.zeros_like(total), torch.zeros_like(number)])
        found[modules[module]] = [
            low.minimum(before[0]),
            high.maximum(before[1]),
            total + before[2],
            number + before[3],
        ]

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        outputs, *_ = [outputs_of(runner, batch) for batch in inputs]
    finally:
        for hook in hooks:
            hook.remove()
    statistics = {name: [x.double().cpu().numpy() for x in values] for name, values in found.items()}
    return {name: (total / number, high - low) for name, (low, high, total, number) in statistics.items()}, outputs


def _read_by(model: nn.Module, member: Member, channels: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (rows, index into ``channels``, offset) for each group of a reader; a reader without groups is one."""
    offset = member.offset + channels * member.stride
    blocks = conv_groups(model, member.module)
    if blocks == 1:
        yield slice(None), np.arange(len(channels)), offset
        return
    module = model.get_submodule(member.module)
    rows, width = module.out_channels // blocks, module.in_channels // blocks
    for block in np.unique(offset // width).tolist():
        index = np.flatnonzero(offset // width == block)
        yield slice(block * rows, (block + 1) * rows), index, offset[index] - block * width


@dataclass
class Folding:
    """How the responses of dead channels are replaced."""

    # (input, mask of the channels to replace, index of the carrier that takes over their weights)
    transfers: list[tuple[ConstantInput, np.ndarray, int]] = field(default_factory=list)
    shifts: list[tuple[ConstantInput, np.ndarray]] = field(default_factory=list)  # (input, mask of channels to fold)
    unread: int = 0  # number of dead channels that are kept with weights of zero
    folded: int = 0  # number of dead channels in the groups that are folded
    carriers: dict[str, list[int]] = field(default_factory=dict)  # dead channels of each group, kept as constants
    lost: set[str] = field(default_factory=set)  # removed readers whose constant no later norm can take over


def plan_folding(constants: Constants, carry: bool) -> Folding:
    """Decide what is folded, and (with ``carry``) which channels carry constants to readers that pad."""
    folding = Folding()
    for name, dead in constants.dead.items():
        inputs = constants.inputs[name]
        carriers = _choose_carriers(inputs, len(dead)) if carry else []
        if carriers:
            folding.carriers[name] = sorted(dead[carriers].tolist())
        shifted = False
        for constant in inputs:
            carrying = np.isin(constant.index, carriers)
            others = ~carrying  # A carrier still emits its own constant.
            if not others.any():
                continue
            if carrying.any() and constant.needs_carrier:
                largest = int(np.where(carrying, np.abs(constant.value[:, 0]), -1.0).argmax())
                folding.transfers.append((constant, others, largest))
            else:
                folding.shifts.append((constant, others))
                shifted |= bool(constant.value[others].any())
        folding.folded += shifted * len(dead)
    return folding


def _choose_carriers(inputs: Sequence[ConstantInput], count: int) -> list[int]:
    """Return a small set of dead channels (as indices) such that each reader that pads sees a nonzero one."""
    padded = [constant for constant in inputs if constant.needs_carrier]
    size = np.zeros((len(padded), count))
    for row, constant in zip(size, padded, strict=True):
        row[constant.index] = np.abs(constant.value[:, 0])
    chosen: list[int] = []
    while len(size):
        usable = size > np.maximum(MIN_CARRIER_RATIO * size.max(1, keepdims=True), NEGLIGIBLE)
        covered = usable.sum(0)
        # Among the channels that cover most readers the largest, to keep rounding errors small.
        smallest = np.where(usable, size, np.inf).min(0)
        best = int(np.where(covered == covered.max(), smallest, -1.0).argmax())
        chosen.append(best)
        size = size[~usable[:, best]]
    return chosen


def apply_folding(model: nn.Module, folding: Folding, removed: Collection[str] = ()) -> dict[str, Tensor]:
    """Change weights, biases and running means in place; return the biases to add to readers that have none.

    Args:
        removed: modules that are removed next. What such a reader still emits moves into the norm after it.
    """
    for constant, mask, carrier in folding.transfers:
        index, value = constant.entries(mask)
        weight = _weight(constant.module)[constant.rows]
        weight[:, constant.offset[carrier]] += _contract(weight, index, value / constant.value[carrier])
    # All channels of a reader at once: in a dense network it reads those of hundreds of groups.
    parts: dict[tuple[str, int], list[tuple[ConstantInput, np.ndarray]]] = defaultdict(list)
    for constant, mask in folding.shifts:
        parts[constant.member.module, constant.rows.start or 0].append((constant, mask))
    shifts: dict[str, tuple[ConstantInput, Tensor]] = {}
    for (name, _), part in parts.items():
        index, value = (np.concatenate(arrays) for arrays in zip(*(c.entries(mask) for c, mask in part), strict=True))
        if value.any() or name in removed:
            constant = part[0][0]
            weight = _weight(constant.module)
            _, shift = shifts.setdefault(name, (constant, weight.new_zeros(len(weight))))
            shift[constant.rows] += _output_shift(constant.module, constant.rows, index, value)
    biases = {}
    for name, (constant, shift) in shifts.items():
        if name in removed and constant.module.bias is not None:
            shift = shift + constant.module.bias.data
        if constant.member.next_norm is not None:
            model.get_submodule(constant.member.next_norm).running_mean -= shift
        elif name in removed:
            folding.lost |= {name} if shift.any() else set()
        elif constant.module.bias is not None:
            constant.module.bias.data += shift
        else:
            biases[name] = shift
    return biases


def zero_inputs(model: nn.Module, groups: Sequence[Group], channels: Mapping[str, Iterable[int]]) -> None:
    """Set the weights that read these channels to zero, in place: their constants are folded, but they are kept."""
    for group in groups:
        kept = channel_index(channels.get(group.id, ()))
        for member in group.readers if len(kept) and not group.zeroed else ():
            module = model.get_submodule(member.module)
            for rows, _, offset in _read_by(model, member, kept):
                runs = offset[:, None] + np.arange(member.stride)
                _weight(module)[rows][:, torch.from_numpy(runs.ravel())] = 0


def _weight(module: nn.Module) -> Tensor:
    """A view of a reader's weight, output axis first."""
    return module.weight.data.transpose(0, 1) if isinstance(module, TRANSPOSED) else module.weight.data


def _contract(weight: Tensor, index: np.ndarray, value: np.ndarray) -> Tensor:
    """The sum over input entries of weight times value, (out, …) as the weight without its input axis."""
    row = np.zeros(weight.shape[1])
    row[index] = value
    row = torch.from_numpy(row).to(weight)
    return (row @ weight.flatten(2)).view(weight[:, 0].shape) if weight.dim() > 2 else weight @ row


def _output_shift(module: nn.Module, rows: slice, index: np.ndarray, value: np.ndarray) -> Tensor:
    """What constant input entries add to an output away from the border, on average, (out,)."""
    weight = _weight(module)[rows]
    # A transposed convolution spreads its kernel over as many positions as it makes of one.
    positions = math.prod(module.stride) if isinstance(module, TRANSPOSED) else 1
    return _contract(weight, index, value).reshape(len(weight), -1).sum(1) / positions
