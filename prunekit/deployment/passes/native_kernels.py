"""Deployed models in PyTorch through kernels of our own (:mod:`prunekit.native`).

What a runtime's operations write to memory and read again, a kernel keeps in registers: a convolution adds what it is
added to and applies the PReLU behind it, and so do the depthwise convolution and the up-sampling. Features lie
channels-last, their channels padded to whole vectors. What no kernel computes stays an ordinary operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import Graph, is_depthwise, pooling
from prunekit.native.library import NoKernels, load

LANES = 8


def use_kernels(graph: Graph) -> int:
    """Let kernels compute what they can; how many calls of them there are.

    Args:
        graph: with its norms folded and its channels padded to multiples of 8.

    Raises:
        NoKernels: they cannot be had on this machine.
    """
    if isinstance(load(), NoKernels):
        raise load()
    made = _concatenations(graph)
    for node in reversed(graph.nodes):
        made += _sum(graph, node)
    for node in graph.nodes:
        made += _alone(graph, node)
    for node in graph.nodes:
        _units(graph, node)
    graph.finish()
    return made


class _Kernel(nn.Module):
    """A call of a kernel; ``slope`` is what is behind it: of a PReLU, 0 for a ReLU, 1 for nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("slope", torch.ones(channels))

    def bend(self, act: nn.PReLU | None) -> None:
        """Take over the PReLU, or (None) the ReLU, behind."""
        slope = torch.zeros(1) if act is None else act.weight.detach()
        self.slope = slope.expand(len(self.slope)).contiguous()


class Depthwise(_Kernel):
    """A depthwise 3×3 convolution, padding 1. Shape: (N, C, H, W), C a multiple of 8, in and out."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.out_channels)
        self.register_buffer("weight", conv.weight.detach().flatten(1).t().contiguous())
        self.register_buffer("bias", torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = _laid(x, len(self.bias))
        n, c, h, w = x.shape
        y = _empty(x, c, h, w)
        _call("infer_depthwise", x, self.weight, self.bias, self.slope, y, n, h, w, c)
        return y


class Convolution(_Kernel):
    """Convolutions of one input, with stride 1 and an output of its size, as the taps of one, outputs side by
    side; and the two depthwise convolutions behind, where they are ``units``.

    A tap is a shift by rows and columns; those of several dilations share the one in the middle.

    Shape:
        input: (N, C, H, W) float32; ``add``: (N, C', H, W), C' a multiple of 8; ``coarse``: (N, C', h, w), which is
        up-sampled and added; output: as ``add``.
    """

    def __init__(self, convs: Sequence[nn.Conv2d]):
        out = sum(conv.out_channels for conv in convs)
        super().__init__(out)
        self.units = nn.ModuleList()
        self.in_channels = convs[0].in_channels
        taps: dict[tuple[int, ...], Tensor] = {}
        start = 0
        for conv in convs:
            for i in range(conv.kernel_size[0]):
                for j in range(conv.kernel_size[1]):
                    shift = tuple(k * d - p for k, d, p in zip((i, j), conv.dilation, conv.padding, strict=True))
                    held = taps.setdefault(shift, conv.weight.new_zeros(conv.in_channels, out))
                    held[:, start : start + conv.out_channels] += conv.weight.detach()[:, :, i, j].t()
            start += conv.out_channels
        weight = torch.stack(list(taps.values()))
        used = weight.abs().sum((0, 2)).nonzero().flatten()
        biases = [torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach() for conv in convs]
        self.register_buffer("weight", weight[:, used].contiguous())
        self.register_buffer("bias", torch.cat(biases))
        self.register_buffer("channels", used.int())
        self.register_buffer("shifts", torch.tensor(list(taps)).t().int().contiguous())

    def forward(self, x: Tensor, add: Tensor | None = None, coarse: Tensor | None = None) -> Tensor:
        out = len(self.bias)
        x = _laid(x, self.in_channels)
        add, coarse = (None if one is None else _laid(one, out) for one in (add, coarse))
        n, c, h, w = x.shape
        y = _empty(x, out, h, w)
        units = [tensor for unit in self.units for tensor in (unit.weight, unit.bias, unit.slope)] or [None] * 6
        sides = (0, 0) if coarse is None else coarse.shape[2:]
        sizes = n, h, w, c, out, len(self.channels), self.shifts.shape[1], *sides, len(self.units)
        held = self.weight, self.bias, self.slope, add, coarse
        _call("infer_conv", x, *held, *units, y, self.channels, self.shifts[0], self.shifts[1], *sizes)
        return y


class Upsample(_Kernel):
    """Bilinear up-sampling to a size, added to ``add``. Shape: (N, C, h, w) to (N, C, H, W), C a multiple of 8."""

    def forward(self, x: Tensor, size: tuple[int, int], add: Tensor | None = None) -> Tensor:
        channels = len(self.slope)
        x, add = _laid(x, channels), None if add is None else _laid(add, channels)
        n, c, h, w = x.shape
        y = _empty(x, c, *size)
        _call("infer_upsample", x, self.slope, add, y, n, h, w, *size, c)
        return y


class Pool(nn.Module):
    """Pooling 2×2, sides rounded up. Shape: (N, C, H, W), C a multiple of 8, to (N, C, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, mean: bool, channels: int):
        super().__init__()
        self.mean, self.channels = mean, channels

    def forward(self, x: Tensor) -> Tensor:
        x = _laid(x, self.channels)
        n, c, h, w = x.shape
        y = _empty(x, c, (h + 1) // 2, (w + 1) // 2)
        _call("infer_pool", x, y, n, h, w, c, int(self.mean))
        return y


def _laid(x: Tensor, channels: int) -> Tensor:
    """The tensor as kernels read it; they get addresses, and would read anything."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(
            f"the deployed form takes float32 (N, {channels}, H, W) on the CPU here, got {x.dtype} "
            f"{tuple(x.shape)} on {x.device}"
        )
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((len(x), channels, height, width), memory_format=torch.channels_last)


def _call(name: str, *arguments: Tensor | int | None) -> None:
    function = getattr(load(), name)
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def _fits(conv: nn.Conv2d | None) -> bool:
    """Whether the convolution has stride 1 and an output of its input's size."""
    return (
        conv is not None
        and conv.groups == 1
        and conv.stride == (1, 1)
        and not isinstance(conv.padding, str)
        and all(2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True))
    )


def _concatenations(graph: Graph) -> int:
    """Convolutions of one input whose outputs stand side by side."""
    made = 0
    for node in graph.nodes:
        if not graph.is_cat(node) or len(node.args[0]) < 2 or graph.shapes[node][1] % LANES:
            continue
        parts = node.args[0]
        convs = [graph.conv(part) for part in parts]
        alone = all(_fits(conv) and len(part.users) == 1 for conv, part in zip(convs, parts, strict=True))
        if alone and len({part.args[0] for part in parts}) == 1:
            _replace(graph, node, Convolution(convs), parts[0].args, "taps")
            made += 1
    return made


def _sum(graph: Graph, node: fx.Node) -> int:
    """A sum of convolutions and up-samplings: each adds to what the one before it has made."""
    # Without readers it is part of a sum that has been taken over.
    if not node.users or not graph.is_whole_sum(node) or graph.shapes[node][1] % LANES:
        return 0
    rest, convs, ups = [], [], []
    for term in graph.terms(node):
        lonely = len(term.users) == 1
        kind = convs if lonely and _fits(graph.conv(term)) else ups if lonely and _bilinear(graph, term) else rest
        kind.append(term)
    if not convs and not ups:
        return 0
    value = rest[0] if rest else None
    for other in rest[1:]:
        with graph.module.graph.inserting_before(node):
            value = graph.module.graph.call_function(torch.add, (value, other))
        graph.shapes[value] = graph.shapes[node]
    for term in convs:
        value = _add(graph, node, Convolution([graph.conv(term)]), (term.args[0], value), term)
    for number, term in enumerate(ups):
        if number == 0 and convs:
            # The size that it is brought to is that of what it is added to.
            value.args = (*value.args, *[None] * (2 - len(value.args)), term.args[0])
            continue
        value = _add(graph, node, Upsample(graph.shapes[node][1]), (term.args[0], term.kwargs["size"], value), term)
    last = _bent(graph, node, graph.module.get_submodule(value.target))
    graph.drop(last, value)
    if last is not node:
        graph.module.graph.erase_node(node)
    return len(convs) + len(ups)


def _alone(graph: Graph, node: fx.Node) -> int:
    """A convolution, a pooling or an up-sampling that is no part of a sum."""
    channels = graph.shapes.get(node, (0, 0))[1] if len(graph.shapes.get(node, ())) == 4 else 0
    if not channels or channels % LANES:
        return 0
    conv = graph.conv(node)
    if _fits(conv):
        _replace(graph, node, Convolution([conv]), node.args, "conv")
    elif conv is not None and is_depthwise(conv) and _three(conv):
        _replace(graph, node, Depthwise(conv), node.args, "depthwise")
    elif _bilinear(graph, node):
        _replace(graph, node, Upsample(channels), (node.args[0], node.kwargs["size"]), "up")
    elif graph.is_call(node, [F.max_pool2d, F.avg_pool2d]):
        pool = pooling(node)
        if pool is None or (pool.kernel, pool.stride) != ((2, 2), (2, 2)) or not pool.ceil:
            return 0
        _replace(graph, node, Pool(node.target is F.avg_pool2d, channels), (node.args[0],), "pool")
    else:
        return 0
    return 1


def _units(graph: Graph, node: fx.Node) -> None:
    """Two depthwise convolutions behind a convolution, which nothing else reads, become its units."""
    kernel, behind, value = graph.called(node, Convolution), [], node
    while kernel is not None and len(behind) < 2 and len(value.users) == 1:
        value = next(iter(value.users))
        unit = graph.called(value, Depthwise)
        if unit is None:
            return
        behind.append((value, unit))
    if len(behind) == 2:
        for used, unit in behind:
            kernel.units.append(unit)
            graph.drop(used, node)


def _three(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def _bilinear(graph: Graph, node: fx.Node) -> bool:
    given = node.kwargs
    return (
        graph.is_call(node, [F.interpolate])
        and given.get("mode") == "bilinear"
        and not given.get("align_corners")
        and not given.get("antialias")
        and isinstance(given.get("size"), tuple)
        and graph.shapes[node][1] % LANES == 0
    )


def _add(graph: Graph, before: fx.Node, kernel: nn.Module, args: tuple[Any, ...], term: fx.Node) -> fx.Node:
    made = graph.insert(before, kernel, args, f"{term.name}_added")
    graph.shapes[made] = graph.shapes[before]
    return made


def _replace(graph: Graph, node: fx.Node, kernel: nn.Module, args: tuple[Any, ...], name: str) -> None:
    made = graph.insert(node, kernel, args, f"{node.name}_{name}")
    graph.shapes[made] = graph.shapes[node]
    last = _bent(graph, node, kernel) if isinstance(kernel, _Kernel) else node
    graph.drop(last, made)
    if last is not node:
        graph.module.graph.erase_node(node)


def _bent(graph: Graph, node: fx.Node, kernel: _Kernel) -> fx.Node:
    """The activation that alone reads a value, taken over by the kernel that makes it; the value itself without one."""
    if len(node.users) != 1:
        return node
    user = next(iter(node.users))
    act = graph.called(user, nn.PReLU)
    if act is None and not graph.is_call(user, [F.relu, torch.relu]):
        return node
    kernel.bend(act)
    return user
