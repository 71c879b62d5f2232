"""Read and write the published CSNet files: a checkpoint, and a layout of the learned channels.

There, a multi-branch convolution is one weight (Σ out, Σ in, k, k) whose slices are the branches; here it is one
convolution for each path. Depthwise and dilated weights are 100 times larger here (see ``layers.blocks``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.backbones.csnet import BLOCKS as DEPTHS
from prunekit.backbones.csnet import csnet
from prunekit.errors import CheckpointError, ExportError
from prunekit.layers import OptionalModules, layer_of
from prunekit.layers.blocks import STEP_SCALE
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import apply_plan

BLOCKS = [(0, 0), *((stage, i) for stage, depth in enumerate(DEPTHS, start=1) for i in range(depth))]
DILATIONS = (1, 2, 4, 8, 16)
WIDTHS = (20, 40)
SUBNORMAL = 1.2e-38  # Below this, float32 loses precision, and arithmetic is many times slower.

Split = list[int]  # channels of each branch


@dataclass
class CSNetLayout:
    """The channels of every multi-branch layer: the splits of its input and output."""

    blocks: dict[tuple[int, int], tuple[Split, Split]]  # by (stage, index)
    fuse: tuple[Split, Split]  # the first layer of the head
    dilated: list[Split]  # the head's dilated convolutions: for each branch the channels of each dilation
    merge: tuple[Split, Split]  # the last layer of the head

    @classmethod
    def parse(cls, entries: list[Any], source: str) -> CSNetLayout:
        """Parse the result of ``read_layout``; ``source`` is the file, for messages."""
        count = len(BLOCKS) + 4
        if len(entries) != count:
            raise CheckpointError(f"{source}: a layout has {count} entries, this one {len(entries)}")
        pairs = [_parse_pair(entry, f"{source}: entry {i}") for i, entry in enumerate(entries[:-1])]
        depths = entries[-1] if isinstance(entries[-1], list) else []
        if depths != list(DEPTHS):
            raise CheckpointError(f"{source}: the numbers of blocks must be {list(DEPTHS)}, this layout has {depths}")
        for i in range(1, len(BLOCKS)):
            if pairs[i][0] != pairs[i - 1][1]:
                raise CheckpointError(
                    f"{source}: entry {i} reads {pairs[i][0]} channels, but entry {i - 1} outputs {pairs[i - 1][1]}"
                )
        fuse, dilated, merge = pairs[len(BLOCKS) :]
        index = len(BLOCKS) + 1
        table = np.asarray(entries[index][2]) if len(entries[index]) > 2 else np.zeros(0)
        if table.shape != (len(fuse[1]), len(DILATIONS)):
            raise CheckpointError(f"{source}: entry {index} needs a table of branches × {len(DILATIONS)} dilations")
        rows = [_parse_split(row, f"{source}: entry {index}") for row in table]
        if dilated[0] != fuse[1] or [sum(row) for row in rows] != dilated[1] or merge[0] != dilated[1]:
            raise CheckpointError(f"{source}: the layers of the head do not match each other")
        return cls(dict(zip(BLOCKS, pairs, strict=False)), fuse, rows, merge)

    @classmethod
    def from_model(cls, model: nn.Module, branches: int = 2) -> CSNetLayout:
        """The layout of a CSNet, dense or slim. Absent branches have 0 channels."""
        blocks: dict[tuple[int, int], tuple[Split, Split]] = {}
        ins, sides = [3], []
        for stage, i in BLOCKS:
            norms = model.get_submodule(f"stage{stage}.{i}.depthwise2_out.norms")
            single = stage > 1 and i == DEPTHS[stage - 1] - 1
            outs = [_width(norms.take(b)) for b in range(1 if single else branches)]
            blocks[stage, i] = ins, outs
            ins = outs
            if single:
                sides.append(outs[0])
        head = model.head
        fused = [_width(head.fuse.mix_out.norms.take(b)) for b in range(len(sides))]
        branch_convs = [head.dilated.branches.take(b) or OptionalModules() for b in range(len(sides))]
        rows = [[_width(convs.take(d)) for d in DILATIONS] for convs in branch_convs]
        merge = [sum(row) for row in rows], [_width(head.merge.mix_out.norms.take(0))]
        return cls(blocks, (sides, fused), rows, merge)

    def outputs(self) -> list[Split]:
        return [*(outs for _, outs in self.blocks.values()), self.fuse[1], self.merge[1], *self.dilated]

    def dump(self) -> list[Any]:
        """The entries of a published layout file."""
        array = partial(np.array, dtype=np.float64)
        return [
            *([ins[0] if i == 0 else array(ins), array(outs)] for i, (ins, outs) in enumerate(self.blocks.values())),
            [array(self.fuse[0]), array(self.fuse[1])],
            [array(self.fuse[1]), array(self.merge[0]), array(self.dilated)],
            [array(self.merge[0]), array(self.merge[1])],
            list(DEPTHS),
        ]


def import_csnet(
    state: dict[str, Tensor], layout: CSNetLayout | None, source: str
) -> tuple[int, Plan | None, nn.Module]:
    """Convert a published model. Subnormal weights become zero.

    The layout of a dense ×1 or ×2 model is None; ``source`` is the file, for messages. Returns the width of the dense
    builder, the plan (None for a dense model), and the model in eval mode.
    """
    width = _builder_width(state, layout, source)
    model = csnet(width)
    plan = None
    if layout is None:
        layout = CSNetLayout.from_model(model)
    else:
        example = torch.zeros(1, 3, 32, 32)
        plan = _plan(model, find_groups(model, example), layout, source)
        model = apply_plan(model, plan, example)
    new_state = model.state_dict()
    used = set()
    for name, key, region, scale in _entries(model, layout):
        if key not in state:
            raise CheckpointError(f"{source} lacks {key}; it is not a CSNet checkpoint, or not of this layout")
        value = state[key]
        if region is not None:
            _check_shape(value, region.shape, key, source)
            value = value[region.outs, region.ins]
        _check_shape(value, new_state[name].shape, key, source)
        if value.is_floating_point() and not name.endswith("running_var"):
            value = torch.where(value.abs() < SUBNORMAL, torch.zeros_like(value), value)
        new_state[name] = value * scale if scale != 1 else value
        used.add(key)
    for key, value in state.items():
        # No dilated convolution may read a branch of the first layer of the head.
        match = re.match(r"oct_fuse\.fuse\.(?:bns|prelus)\.(\d+)\.", key)
        unread = match and not sum(layout.dilated[int(match[1])])
        if key not in used and value.numel() and not unread:
            raise CheckpointError(f"{source} has {key}, which no CSNet of this layout has")
    model.load_state_dict(new_state)
    return width, plan, model.eval()


def export_csnet(model: nn.Module) -> tuple[dict[str, Tensor], CSNetLayout]:
    """Convert a CSNet to a published state dict and layout; raise ExportError for another model.

    The published form has no biases; those left by constant folding are moved into the norms after them.
    """
    if type(model).__name__ != "CSNet":
        raise ExportError(f"only a CSNet can be written in the published form, not a {type(model).__name__}")
    depths = [len(getattr(model, f"stage{stage}")) for stage in range(1, len(DEPTHS) + 1)]
    if depths != list(DEPTHS):
        raise ExportError(f"the published form has {list(DEPTHS)} blocks, this model has {depths}")
    model = _without_biases(model)
    norms = (re.fullmatch(r"stage\d+\.\d+\.depthwise2_out\.norms\.(\d+)", name) for name, _ in model.named_modules())
    layout = CSNetLayout.from_model(model, 1 + max([1, *(int(match[1]) for match in norms if match)]))
    own_state = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, key, region, scale in _entries(model, layout):
        value = _unscale(own_state[name], scale) if scale != 1 else own_state[name]
        if region is None:
            state[key] = value.clone()
        else:
            state.setdefault(key, torch.zeros(region.shape))[region.outs, region.ins] = value
    return state, layout


class _Region(NamedTuple):
    """The slices of a path in the one weight of its multi-branch convolution."""

    shape: tuple[int, ...]
    outs: slice
    ins: slice


def _entries(model: nn.Module, layout: CSNetLayout) -> Iterator[tuple[str, str, _Region | None, float]]:
    """For each tensor here: its name, the published key, its region there, and how much larger it is here."""
    for name in model.state_dict():
        module, _, tensor = name.rpartition(".")
        scale = STEP_SCALE if re.search(r"\.depthwise[12]\.|\.dilated\.branches\.", name) else 1.0
        path = re.fullmatch(r"(.+)\.mix\.paths\.(\d+)to(\d+)", module)
        if path:
            ins, outs, key = _multi_branch(path[1], layout)
            k = model.get_submodule(module).kernel_size[0]
            parts = [slice(sum(s[:b]), sum(s[: b + 1])) for s, b in ((outs, int(path[3])), (ins, int(path[2])))]
            region = _Region((sum(outs), sum(ins), k, k), *parts)
            yield name, f"{key}.conv.weight", region, scale
        else:
            yield name, f"{_published_name(module)}.{tensor}", None, scale


def _multi_branch(layer: str, layout: CSNetLayout) -> tuple[Split, Split, str]:
    """The splits of a layer's input and output, and its published name."""
    if layer == "head.fuse":
        return *layout.fuse, "oct_fuse.fuse"
    if layer == "head.merge":
        return *layout.merge, "oct_fuse.fuse1x1"
    stage, i = map(int, re.fullmatch(r"stage(\d+)\.(\d+)", layer).groups())
    return *layout.blocks[stage, i], f"stage{stage}.{i}.conv1x1"


# After norms are called bns and acts prelus.
_NAMES = [
    (r"(stage\d+\.\d+)\.mix_out\.(bns|prelus)\.(\d+)", r"\1.conv1x1.\2.\3"),
    (r"(stage\d+\.\d+)\.depthwise(\d)\.(\d+)", r"\1.conv3x3_\2.convs.\3"),
    (r"(stage\d+\.\d+)\.depthwise(\d)_out\.(bns|prelus)\.(\d+)", r"\1.conv3x3_\2.\3.\4"),
    (r"head\.fuse\.mix_out\.(bns|prelus)\.(\d+)", r"oct_fuse.fuse.\1.\2"),
    (r"head\.dilated\.out\.(bn|prelu)s\.(\d+)", r"oct_fuse.ms.convs.\2.\1"),
    (r"head\.merge\.mix_out\.(bns|prelus)\.(\d+)", r"oct_fuse.fuse1x1.\1.\2"),
    (r"classifier", r"cls_layer"),
]


def _published_name(module: str) -> str:
    dilated = re.fullmatch(r"head\.dilated\.branches\.(\d+)\.(\d+)", module)
    if dilated:
        return f"oct_fuse.ms.convs.{dilated[1]}.msconv.{DILATIONS.index(int(dilated[2]))}"
    for pattern, published in _NAMES:
        match = re.fullmatch(pattern, module.replace(".norms.", ".bns.").replace(".acts.", ".prelus."))
        if match:
            return match.expand(published)
    raise ExportError(f"{module} has no name in the published form")


def _plan(model: nn.Module, groups: Sequence[Group], layout: CSNetLayout, source: str) -> Plan:
    """The plan that keeps the first channels of each branch, as many as the layout has."""
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
                f"{source}: {layer} keeps {kept} channels in branch {branch}, but has only {group.channels}"
            )
        dead[group.id] = set(range(kept, group.channels))
    plan = make_plan(model, groups, dead)
    for layer, split in plan.splits.items():
        if not any(split):
            raise CheckpointError(f"{source}: {layer} has no channels, so the output does not depend on the image")
    plan.groups = {name: len(kept) for name, kept in plan.groups.items()}
    return plan


def _builder_width(state: dict[str, Tensor], layout: CSNetLayout | None, source: str) -> int:
    """The smallest published width that has as many channels as this model."""
    if layout is not None:
        for width in WIDTHS:
            splits = zip(layout.outputs(), CSNetLayout.from_model(csnet(width)).outputs(), strict=False)
            if all(len(a) <= len(b) and all(x <= y for x, y in zip(a, b, strict=False)) for a, b in splits):
                return width
        raise CheckpointError(f"{source}: the layout has more channels than the ×2 model; only ×1 and ×2 are supported")
    first = state.get("stage0.0.conv1x1.conv.weight")
    if first is None:
        raise CheckpointError(f"{source} lacks stage0.0.conv1x1.conv.weight; it is not a CSNet checkpoint")
    if first.shape[0] not in WIDTHS:
        raise CheckpointError(
            f"{source} starts with {first.shape[0]} channels, so it is not a dense ×1 or ×2 model; give its layout file"
        )
    return int(first.shape[0])


def _check_shape(value: Tensor, shape: Sequence[int], key: str, source: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise CheckpointError(
            f"{source}: {key} has shape {tuple(value.shape)}, the layout needs {tuple(shape)}; give the layout file "
            "that belongs to it"
        )


def _unscale(value: Tensor, scale: float) -> Tensor:
    """The float32 number that gives ``value`` when multiplied by ``scale``; the nearest if there is none."""
    quotient = value / scale
    best = quotient
    for limit in (torch.inf, -torch.inf):
        neighbor = torch.nextafter(quotient, torch.full_like(quotient, limit))
        best = torch.where((best * scale != value) & (neighbor * scale == value), neighbor, best)
    return best


def _without_biases(model: nn.Module) -> nn.Module:
    """A copy whose convolutions, except the last, have no bias; the norms after them have other running means."""
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


def _parse_pair(entry: Any, source: str) -> tuple[Split, Split]:
    if not isinstance(entry, list) or len(entry) < 2:
        raise CheckpointError(f"{source} is not a pair of splits")
    return _parse_split(entry[0], source), _parse_split(entry[1], source)


def _parse_split(values: Any, source: str) -> Split:
    split = np.atleast_1d(np.asarray(values, np.float64))
    if split.ndim != 1 or not np.isfinite(split).all() or (split < 0).any() or (split != np.floor(split)).any():
        raise CheckpointError(f"{source} has {split.tolist()}, which are not numbers of channels")
    return [int(value) for value in split]


def _width(module: nn.BatchNorm2d | nn.Conv2d | None) -> int:
    return 0 if module is None else len(module.weight)
