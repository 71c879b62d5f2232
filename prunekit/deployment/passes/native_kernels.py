"""Pass: compute operations with prunekit's own C++ kernels (:mod:`prunekit.native`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import InferenceGraph, is_depthwise, parse_pooling
from prunekit.native.library import NoKernels, load

LANES = 8  # float32 numbers in a vector


def use_native_kernels(graph: InferenceGraph) -> int:
    """Replace operations by native kernels, and fuse sums, activations and depthwise convolutions into them.

    Replaced are convolutions with stride 1 that keep the size, depthwise 3×3 convolutions, bilinear upsampling and 2×2
    pooling, if their outputs have a multiple of 8 channels: after the folding of norms and the padding of channels.
    Returns the number of operations replaced; raises NoKernels if the kernels are not available on this machine.
    """
    if isinstance(load(), NoKernels):
        raise load()
    replaced = _replace_concatenations(graph)
    for node in reversed(graph.nodes):
        replaced += _replace_sum(graph, node)
    for node in graph.nodes:
        replaced += _replace_single(graph, node)
    for node in graph.nodes:
        _fuse_depthwise_pair(graph, node)
    graph.recompile()
    return replaced


class NativeOp(nn.Module):
    """A native kernel with an activation: PReLU with ``slope`` (C,); 0 is a ReLU, 1 is no activation."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("slope", torch.ones(channels))


class NativeDepthwise(NativeOp):
    """A depthwise 3×3 convolution with padding 1. Shape: (N, C, H, W) in and out, C a multiple of 8."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.out_channels)
        self.register_buffer("weight", conv.weight.detach().flatten(1).t().contiguous())
        self.register_buffer("bias", _bias(conv))

    def forward(self, x: Tensor) -> Tensor:
        x = _check(x, len(self.bias))
        n, c, h, w = x.shape
        y = _empty(n, c, h, w)
        _call("infer_depthwise", x, self.weight, self.bias, self.slope, y, n, h, w, c)
        return y


class NativeConv(NativeOp):
    """Convolutions of one input with stride 1 and same padding, their outputs concatenated.

    They are computed as one convolution whose taps are shifts by rows and columns; different dilations share the middle
    tap. Optionally two depthwise convolutions follow (``depthwise``). (N, C, H, W) becomes (N, C', H, W), C' a multiple
    of 8; ``add`` (N, C', H, W) and ``coarse`` (N, C', h, w), upsampled, are added to it.
    """

    def __init__(self, convs: Sequence[nn.Conv2d]):
        out_channels = sum(conv.out_channels for conv in convs)
        super().__init__(out_channels)
        self.depthwise = nn.ModuleList()
        self.in_channels = convs[0].in_channels
        taps: dict[tuple[int, ...], Tensor] = {}
        start = 0
        for conv in convs:
            for i in range(conv.kernel_size[0]):
                for j in range(conv.kernel_size[1]):
                    shift = tuple(k * d - p for k, d, p in zip((i, j), conv.dilation, conv.padding, strict=True))
                    tap = taps.setdefault(shift, conv.weight.new_zeros(conv.in_channels, out_channels))
                    tap[:, start : start + conv.out_channels] += conv.weight.detach()[:, :, i, j].t()
            start += conv.out_channels
        weight = torch.stack(list(taps.values()))
        used = weight.abs().sum((0, 2)).nonzero().flatten()
        self.register_buffer("weight", weight[:, used].contiguous())
        self.register_buffer("bias", torch.cat([_bias(conv) for conv in convs]))
        self.register_buffer("channels", used.int())
        self.register_buffer("shifts", torch.tensor(list(taps)).t().int().contiguous())

    def forward(self, x: Tensor, add: Tensor | None = None, coarse: Tensor | None = None) -> Tensor:
        out_channels = len(self.bias)
        x = _check(x, self.in_channels)
        add, coarse = (None if value is None else _check(value, out_channels) for value in (add, coarse))
        n, c, h, w = x.shape
        y = _empty(n, out_channels, h, w)
        depthwise = [tensor for op in self.depthwise for tensor in (op.weight, op.bias, op.slope)] or [None] * 6
        coarse_size = (0, 0) if coarse is None else coarse.shape[2:]
        sizes = n, h, w, c, out_channels, len(self.channels), self.shifts.shape[1], *coarse_size, len(self.depthwise)
        tensors = self.weight, self.bias, self.slope, add, coarse
        _call("infer_conv", x, *tensors, *depthwise, y, self.channels, self.shifts[0], self.shifts[1], *sizes)
        return y


class NativeUpsample(NativeOp):
    """Bilinear upsampling, added to ``add``. Shape: (N, C, h, w) to (N, C, H, W), C a multiple of 8."""

    def forward(self, x: Tensor, size: tuple[int, int], add: Tensor | None = None) -> Tensor:
        channels = len(self.slope)
        x, add = _check(x, channels), None if add is None else _check(add, channels)
        n, c, h, w = x.shape
        y = _empty(n, c, *size)
        _call("infer_upsample", x, self.slope, add, y, n, h, w, *size, c)
        return y


class NativePool(nn.Module):
    """2×2 pooling with ceil_mode. Shape: (N, C, H, W) to (N, C, ⌈H/2⌉, ⌈W/2⌉), C a multiple of 8."""

    def __init__(self, mean: bool, channels: int):
        super().__init__()
        self.mean, self.channels = mean, channels

    def forward(self, x: Tensor) -> Tensor:
        x = _check(x, self.channels)
        n, c, h, w = x.shape
        y = _empty(n, c, (h + 1) // 2, (w + 1) // 2)
        _call("infer_pool", x, y, n, h, w, c, int(self.mean))
        return y


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()


def _check(x: Tensor, channels: int) -> Tensor:
    """The tensor in channels-last memory; checked, because a kernel gets its address only."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(
            f"a native kernel takes float32 (N, {channels}, H, W) on the CPU, got {x.dtype} {tuple(x.shape)} on "
            f"{x.device}"
        )
    return x.contiguous(memory_format=torch.channels_last)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, memory_format=torch.channels_last)


def _call(name: str, *arguments: Tensor | int | None) -> None:
    function = getattr(load(), name)
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def _replace_concatenations(graph: InferenceGraph) -> int:
    replaced = 0
    for node in graph.nodes:
        if not graph.is_cat(node) or len(node.args[0]) < 2 or graph.shapes[node][1] % LANES:
            continue
        parts = node.args[0]
        convs = [graph.conv(part) for part in parts]
        fits = all(_keeps_size(conv) and len(part.users) == 1 for conv, part in zip(convs, parts, strict=True))
        if fits and len({part.args[0] for part in parts}) == 1:
            _replace(graph, node, NativeConv(convs), parts[0].args)
            replaced += 1
    return replaced


def _replace_sum(graph: InferenceGraph, node: fx.Node) -> int:
    """Replace a sum of convolutions and upsampling by kernels that each add to the result of the one before."""
    # A node without users is part of a sum that has been replaced.
    if not node.users or not graph.is_outermost_sum(node) or graph.shapes[node][1] % LANES:
        return 0
    shape = graph.shapes[node]
    terms = graph.terms(node)
    convs = [term for term in terms if len(term.users) == 1 and _keeps_size(graph.conv(term))]
    upsamples = [term for term in terms if len(term.users) == 1 and _is_bilinear(graph, term)]
    others = [term for term in terms if term not in convs and term not in upsamples]
    replaced = len(convs) + len(upsamples)
    if not replaced:
        return 0
    total = graph.insert_sum(node, others) if others else None
    for term in convs:
        total = graph.insert_module(
            node, NativeConv([graph.conv(term)]), (term.args[0], total), f"{term.name}_added", shape
        )
    if convs and upsamples:
        # The last convolution upsamples and adds the first of them, which has its size.
        total.args = (*total.args, upsamples.pop(0).args[0])
    for term in upsamples:
        args = term.args[0], term.kwargs["size"], total
        total = graph.insert_module(node, NativeUpsample(shape[1]), args, f"{term.name}_added", shape)
    _take_over(graph, node, total)
    return replaced


def _replace_single(graph: InferenceGraph, node: fx.Node) -> int:
    """Replace a convolution, pooling or upsampling that is not a term of a sum."""
    shape = graph.shapes.get(node, ())
    if len(shape) != 4 or shape[1] % LANES or not shape[1]:
        return 0
    conv, args = graph.conv(node), node.args
    if _keeps_size(conv):
        kernel: nn.Module = NativeConv([conv])
    elif conv is not None and is_depthwise(conv) and _is_3x3(conv):
        kernel = NativeDepthwise(conv)
    elif _is_bilinear(graph, node):
        kernel, args = NativeUpsample(shape[1]), (node.args[0], node.kwargs["size"])
    elif graph.is_function(node, [F.max_pool2d, F.avg_pool2d]):
        pool = parse_pooling(node)
        if pool is None or (pool.kernel, pool.stride) != ((2, 2), (2, 2)) or not pool.ceil_mode:
            return 0
        kernel, args = NativePool(node.target is F.avg_pool2d, shape[1]), (node.args[0],)
    else:
        return 0
    _replace(graph, node, kernel, args)
    return 1


def _fuse_depthwise_pair(graph: InferenceGraph, node: fx.Node) -> None:
    """Fuse two depthwise convolutions into the convolution before them, if no other node reads the values between."""
    kernel, value, pair = graph.module_of(node, NativeConv), node, []
    while kernel is not None and len(pair) < 2 and len(value.users) == 1:
        value = next(iter(value.users))
        depthwise = graph.module_of(value, NativeDepthwise)
        if depthwise is None:
            return
        pair.append((value, depthwise))
    if len(pair) == 2:
        for value, depthwise in pair:
            kernel.depthwise.append(depthwise)
            graph.replace(value, node)


def _keeps_size(conv: nn.Conv2d | None) -> bool:
    return (
        conv is not None
        and conv.groups == 1
        and conv.stride == (1, 1)
        and not isinstance(conv.padding, str)
        and all(2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True))
    )


def _is_3x3(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def _is_bilinear(graph: InferenceGraph, node: fx.Node) -> bool:
    options = node.kwargs
    return (
        graph.is_function(node, [F.interpolate])
        and options.get("mode") == "bilinear"
        and not options.get("align_corners")
        and not options.get("antialias")
        and isinstance(options.get("size"), tuple)
        and graph.shapes[node][1] % LANES == 0
    )


def _replace(graph: InferenceGraph, node: fx.Node, kernel: nn.Module, args: tuple[Any, ...]) -> None:
    _take_over(graph, node, graph.insert_module(node, kernel, args, f"{node.name}_native", graph.shapes[node]))


def _take_over(graph: InferenceGraph, node: fx.Node, call: fx.Node) -> None:
    """Replace a node by the call of a kernel, which also computes the activation if that is the node's only user."""
    kernel = graph.module.get_submodule(call.target)
    if isinstance(kernel, NativeOp) and len(node.users) == 1:
        user = next(iter(node.users))
        prelu = graph.module_of(user, nn.PReLU)
        if prelu is not None or graph.is_function(user, [F.relu, torch.relu]):
            slope = torch.zeros(1) if prelu is None else prelu.weight.detach()
            kernel.slope = slope.expand(len(kernel.slope)).contiguous()
            graph.replace(user, call)
            graph.module.graph.erase_node(node)
            return
    graph.replace(node, call)
