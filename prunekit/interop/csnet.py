"""The published CSNet files in and out: a checkpoint whose multi-branch convolutions are one weight each, and a layout
of the learned channels.

In the checkpoint a multi-branch convolution is one weight (Σ out, Σ in, k, k) whose branches are contiguous slices;
here it is one convolution a path. The depthwise and the dilated weights are stored a hundred times as large here (see
``layers.blocks``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.backbones.csnet import STAGES, csnet
from prunekit.errors import CheckpointError, ExportError
from prunekit.layers import layer_of
from prunekit.layers.blocks import STEP_SCALE
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.make_plan import make_plan
from prunekit.pruning.surgery.slim import apply_plan

BLOCKS = [(0, 0), *((s, i) for s, (n, _) in enumerate(STAGES, start=1) for i in range(n))]
DILATIONS = (1, 2, 4, 8, 16)
WIDTHS = (20, 40)
SUBNORMAL = 1.2e-38  # below this a float32 has no full precision, and arithmetic on it is many times as slow


@dataclass
class Layout:
    """The channels of every multi-branch layer: in and out of each block, of the head's first and last layer, and of
    each dilation of each branch between."""

    blocks: dict[tuple[int, int], tuple[list[int], list[int]]]
    fuse: tuple[list[int], list[int]]
    dilated: list[list[int]]
    merge: tuple[list[int], list[int]]

    @classmethod
    def parse(cls, held: list[Any], where: str) -> Layout:
        """From what ``read_layout`` gives.

        Raises:
            CheckpointError: an entry has another form, or does not fit the one before.
        """
        if len(held) != len(BLOCKS) + 4:
            raise CheckpointError(f"{where}: a layout has {len(BLOCKS) + 4} entries, this one {len(held)}")
        pairs = [_pair(entry, f"{where}: entry {n}") for n, entry in enumerate(held[:-1])]
        depths = held[-1] if isinstance(held[-1], list) else []
        if depths != [n for n, _ in STAGES]:
            raise CheckpointError(
                f"{where}: the blocks of a stage are {[n for n, _ in STAGES]}, this layout has {depths}"
            )
        for n in range(1, len(BLOCKS)):
            if pairs[n][0] != pairs[n - 1][1]:
                raise CheckpointError(
                    f"{where}: entry {n} reads {pairs[n][0]} channels, and entry {n - 1} makes {pairs[n - 1][1]}"
                )
        fuse, dilated, merge = pairs[len(BLOCKS) :]
        entry = held[len(BLOCKS) + 1]
        table = np.asarray(entry[2]) if len(entry) > 2 else np.zeros(0)
        if table.shape != (len(fuse[1]), len(DILATIONS)):
            raise CheckpointError(
                f"{where}: entry {len(BLOCKS) + 1} needs a table of branches × {len(DILATIONS)} dilations"
            )
        rows = [_whole(row, f"{where}: entry {len(BLOCKS) + 1}") for row in table]
        if dilated[0] != fuse[1] or [sum(row) for row in rows] != dilated[1] or merge[0] != dilated[1]:
            raise CheckpointError(f"{where}: the layers of the head do not fit each other")
        return cls(dict(zip(BLOCKS, pairs, strict=False)), fuse, rows, merge)

    @classmethod
    def of(cls, model: nn.Module, branches: int = 2) -> Layout:
        """Of a CSNet of any shape; absent branches have 0 channels."""
        blocks: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        before = [3]
        sides = []
        for s, i in BLOCKS:
            norms = model.get_submodule(f"stage{s}.{i}.depthwise2_out.norms")
            single = s > 1 and i == STAGES[s - 1][0] - 1
            out = [norms[str(b)].num_features if str(b) in norms else 0 for b in range(1 if single else branches)]
            blocks[s, i] = before, out
            before = out
            if single:
                sides.append(out[0])
        head = model.head
        widths = [_width(head.fuse.mix_out.norms.take(b)) for b in range(len(sides))]
        rows = []
        for b in range(len(sides)):
            convs = head.dilated.branches.take(b)
            rows.append([convs[str(d)].out_channels if convs and str(d) in convs else 0 for d in DILATIONS])
        return cls(
            blocks, (sides, widths), rows, ([sum(row) for row in rows], [_width(head.merge.mix_out.norms.take(0))])
        )

    def dump(self) -> list[Any]:
        """As the published files have it."""

        def array(values: Sequence[Any]) -> np.ndarray:
            return np.array(values, np.float64)

        entries = [
            [ins[0] if n == 0 else array(ins), array(outs)] for n, (ins, outs) in enumerate(self.blocks.values())
        ]
        return [
            *entries,
            [array(self.fuse[0]), array(self.fuse[1])],
            [array(self.fuse[1]), array(self.merge[0]), array(self.dilated)],
            [array(self.merge[0]), array(self.merge[1])],
            [n for n, _ in STAGES],
        ]


def import_csnet(state: dict[str, Tensor], layout: Layout | None, where: str) -> tuple[int, Plan | None, nn.Module]:
    """A published model as one of ours.

    Args:
        state: from ``read_checkpoint``.
        layout: from ``Layout.parse``; None for a dense ×1 or ×2.
        where: the file, for errors.

    Returns:
        the width of the dense builder, the plan (None for a dense model), and the model in eval mode. Subnormal weights
        are zero in it: they move no output, and more than double the time on a CPU.

    Raises:
        CheckpointError: a key is missing, not known, or of a shape that does not fit the layout.
    """
    width = _builder_width(state, layout, where)
    model = csnet(width)
    groups = find_groups(model, torch.zeros(1, 3, 32, 32))
    plan = None
    if layout is None:
        layout = Layout.of(model)
    else:
        plan = _plan(model, groups, layout, where)
        model = apply_plan(model, plan, torch.zeros(1, 3, 32, 32))
    own = model.state_dict()
    read = set()
    for name, key, region, scale in _entries(model, layout):
        if key not in state:
            raise CheckpointError(f"{where} lacks {key}; it is no CSNet checkpoint, or not of this layout")
        value = state[key]
        if region is not None:
            shape = region.shape
            if tuple(value.shape) != shape:
                raise CheckpointError(f"{where}: {key} has shape {tuple(value.shape)}, the layout needs {shape}")
            value = value[region.outs, region.ins]
        if tuple(value.shape) != tuple(own[name].shape):
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(value.shape)}, the layout needs {tuple(own[name].shape)}"
            )
        own[name] = _clean(value, name) * scale if scale != 1 else _clean(value, name)
        read.add(key)
    strange = [key for key, value in state.items() if key not in read and value.numel() and not _unread(key, layout)]
    if strange:
        raise CheckpointError(f"{where} has {strange[0]}, which no CSNet of this layout has")
    model.load_state_dict(own)
    return width, plan, model.eval()


def export_csnet(model: nn.Module) -> tuple[dict[str, Tensor], Layout]:
    """One of our CSNets as a published state dict and layout.

    Biases that constants left in convolutions are moved into the norms behind them, since the published form has none.

    Raises:
        ExportError: the model is no CSNet.
    """
    if type(model).__name__ != "CSNet":
        raise ExportError(f"only a CSNet can be written in the published form, and this is a {type(model).__name__}")
    model = _without_biases(model)
    layout = Layout.of(model, 1 + max(_branches(model)))
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, key, region, scale in _entries(model, layout):
        value = _descale(own[name], scale) if scale != 1 else own[name]
        if region is None:
            state[key] = value.clone()
        else:
            state.setdefault(key, torch.zeros(region.shape))[region.outs, region.ins] = value
    return state, layout


@dataclass
class _Region:
    """Where a path stands in the one weight of its multi-branch convolution."""

    shape: tuple[int, ...]
    outs: slice
    ins: slice


def _entries(model: nn.Module, layout: Layout) -> Iterator[tuple[str, str, _Region | None, float]]:
    """For each tensor of ours: its name, the published key, the region in it, and how much larger ours is stored."""
    for name in model.state_dict():
        module, _, tensor = name.rpartition(".")
        scale = STEP_SCALE if re.search(r"\.depthwise[12]\.|\.dilated\.branches\.", name) else 1.0
        path = re.fullmatch(r"(.+)\.mix\.paths\.(\d+)to(\d+)", module)
        if path:
            layer, i, j = path[1], int(path[2]), int(path[3])
            ins, outs, key = _multi(layer, layout)
            k = model.get_submodule(module).kernel_size[0]
            region = _Region((sum(outs), sum(ins), k, k), _slice(outs, j), _slice(ins, i))
            yield name, f"{key}.conv.weight", region, scale
        else:
            yield name, f"{_published(module)}.{tensor}", None, scale


def _multi(layer: str, layout: Layout) -> tuple[list[int], list[int], str]:
    if layer == "head.fuse":
        return *layout.fuse, "oct_fuse.fuse"
    if layer == "head.merge":
        return *layout.merge, "oct_fuse.fuse1x1"
    s, i = map(int, re.fullmatch(r"stage(\d+)\.(\d+)", layer).groups())
    return *layout.blocks[s, i], f"stage{s}.{i}.conv1x1"


_NAMES = [
    (r"(stage\d+\.\d+)\.mix_out\.norms\.(\d+)", r"\1.conv1x1.bns.\2"),
    (r"(stage\d+\.\d+)\.mix_out\.acts\.(\d+)", r"\1.conv1x1.prelus.\2"),
    (r"(stage\d+\.\d+)\.depthwise(\d)\.(\d+)", r"\1.conv3x3_\2.convs.\3"),
    (r"(stage\d+\.\d+)\.depthwise(\d)_out\.norms\.(\d+)", r"\1.conv3x3_\2.bns.\3"),
    (r"(stage\d+\.\d+)\.depthwise(\d)_out\.acts\.(\d+)", r"\1.conv3x3_\2.prelus.\3"),
    (r"head\.fuse\.mix_out\.norms\.(\d+)", r"oct_fuse.fuse.bns.\1"),
    (r"head\.fuse\.mix_out\.acts\.(\d+)", r"oct_fuse.fuse.prelus.\1"),
    (r"head\.dilated\.out\.norms\.(\d+)", r"oct_fuse.ms.convs.\1.bn"),
    (r"head\.dilated\.out\.acts\.(\d+)", r"oct_fuse.ms.convs.\1.prelu"),
    (r"head\.merge\.mix_out\.norms\.(\d+)", r"oct_fuse.fuse1x1.bns.\1"),
    (r"head\.merge\.mix_out\.acts\.(\d+)", r"oct_fuse.fuse1x1.prelus.\1"),
    (r"classifier", r"cls_layer"),
]


def _published(module: str) -> str:
    dilated = re.fullmatch(r"head\.dilated\.branches\.(\d+)\.(\d+)", module)
    if dilated:
        return f"oct_fuse.ms.convs.{dilated[1]}.msconv.{DILATIONS.index(int(dilated[2]))}"
    for ours, theirs in _NAMES:
        found = re.fullmatch(ours, module)
        if found:
            return found.expand(theirs)
    raise ExportError(f"{module} has no name in the published form")


def _plan(model: nn.Module, groups: Sequence[Group], layout: Layout, where: str) -> Plan:
    """The plan that keeps the first channels of each branch, as many as the layout says."""
    counts: dict[tuple[str, int], list[int]] = {
        **{(f"stage{s}.{i}", b): [n] for (s, i), (_, outs) in layout.blocks.items() for b, n in enumerate(outs)},
        **{("head.fuse", b): [n] for b, n in enumerate(layout.fuse[1])},
        **{("head.dilated", b): row for b, row in enumerate(layout.dilated)},
        ("head.merge", 0): layout.merge[1],
    }
    dead = {}
    for group in groups:
        if group.reason is not None:
            continue
        layer, branch = layer_of(model, group.members[0].tensor.rpartition(".")[0])
        row = counts.get((layer, branch), [0])
        kept = row[DILATIONS.index(int(group.id.rpartition(".")[2]))] if layer == "head.dilated" else row[0]
        if kept > group.channels:
            raise CheckpointError(
                f"{where}: {layer} keeps {kept} channels in branch {branch}, and has {group.channels}"
            )
        dead[group.id] = set(range(kept, group.channels))
    plan = make_plan(model, groups, dead)
    if not all(any(split) for split in plan.splits.values()):
        layer = next(layer for layer, split in plan.splits.items() if not any(split))
        raise CheckpointError(f"{where}: nothing of the image would pass {layer}")
    plan.groups = {name: len(kept) for name, kept in plan.groups.items()}
    return plan


def _builder_width(state: dict[str, Tensor], layout: Layout | None, where: str) -> int:
    """The smallest published width that has as many channels as this model."""
    if layout is not None:
        for width in WIDTHS:
            dense = Layout.of(csnet(width))
            rows = [(a, b) for key, (_, a) in layout.blocks.items() for b in [dense.blocks[key][1]]]
            rows += [(layout.fuse[1], dense.fuse[1]), (layout.merge[1], dense.merge[1])]
            rows += list(zip(layout.dilated, dense.dilated, strict=False))
            if all(len(a) <= len(b) and all(x <= y for x, y in zip(a, b, strict=False)) for a, b in rows):
                return width
        raise CheckpointError(f"{where}: the layout has more channels than the ×2 model; it is not made from ×1 or ×2")
    first = state.get("stage0.0.conv1x1.conv.weight")
    if first is None:
        raise CheckpointError(f"{where} lacks stage0.0.conv1x1.conv.weight; it is no CSNet checkpoint")
    if first.shape[0] not in WIDTHS:
        raise CheckpointError(
            f"{where} begins with {first.shape[0]} channels, so it is no dense ×1 or ×2 model; give its layout file too"
        )
    return int(first.shape[0])


def _clean(value: Tensor, name: str) -> Tensor:
    if name.endswith("running_var") or not value.is_floating_point():
        return value
    return torch.where(value.abs() < SUBNORMAL, torch.zeros_like(value), value)


def _descale(value: Tensor, scale: float) -> Tensor:
    """What, multiplied by ``scale`` in float32, gives ``value`` again; the nearest where nothing does."""
    near = value / scale
    best = near
    for other in (
        torch.nextafter(near, torch.full_like(near, torch.inf)),
        torch.nextafter(near, -torch.full_like(near, torch.inf)),
    ):
        best = torch.where((best * scale != value) & (other * scale == value), other, best)
    return best


def _without_biases(model: nn.Module) -> nn.Module:
    """A copy in which no convolution but the last has a bias: the norm behind takes it out of its mean instead."""
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if not isinstance(conv, nn.Conv2d) or conv.bias is None or name == "classifier":
            continue
        path = re.fullmatch(r"(.+)\.mix\.paths\.\d+to(\d+)", name)
        if path:
            model.get_submodule(f"{path[1]}.mix_out.norms.{path[2]}").running_mean -= conv.bias.detach()
        else:
            branch, dilation = re.fullmatch(r"head\.dilated\.branches\.(\d+)\.(\d+)", name).groups()
            convs = model.head.dilated.branches[branch]
            start = sum(c.out_channels for d, c in convs.items() if int(d) < int(dilation))
            mean = model.head.dilated.out.norms[branch].running_mean
            mean[start : start + conv.out_channels] -= conv.bias.detach()
        conv.bias = None
    return model


def _branches(model: nn.Module) -> Iterator[int]:
    for name, _ in model.named_modules():
        found = re.fullmatch(r"stage\d+\.\d+\.depthwise2_out\.norms\.(\d+)", name)
        if found:
            yield int(found[1])
    yield 1


def _unread(key: str, layout: Layout) -> bool:
    """Whether this key belongs to a branch that the layout has, but whose channels nothing reads."""
    found = re.match(r"oct_fuse\.fuse\.(?:bns|prelus)\.(\d+)\.", key)
    return bool(found) and not sum(layout.dilated[int(found[1])])


def _pair(entry: Any, where: str) -> tuple[list[int], list[int]]:
    if not isinstance(entry, list) or len(entry) < 2:
        raise CheckpointError(f"{where} is no pair of splits")
    return _whole(entry[0], where), _whole(entry[1], where)


def _whole(values: Any, where: str) -> list[int]:
    found = np.atleast_1d(np.asarray(values, np.float64))
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any() or (found != np.floor(found)).any():
        raise CheckpointError(f"{where} holds {found.tolist()}, which are no numbers of channels")
    return [int(value) for value in found]


def _slice(parts: list[int], index: int) -> slice:
    ends = list(accumulate(parts))
    return slice(ends[index] - parts[index], ends[index])


def _width(norm: nn.Module | None) -> int:
    return 0 if norm is None else norm.num_features
