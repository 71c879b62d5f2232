"""Pass: pad channels with zeros to a multiple of the processor's vector width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import POOLS, InferenceGraph, is_depthwise
from prunekit.deployment.passes.fold_norms import set_weights


@dataclass(frozen=True)
class _Layout:
    """Positions of the original channels among the ``width`` channels of a padded value."""

    positions: tuple[int, ...]
    width: int

    @staticmethod
    def contiguous(channels: int, padding: int = 0) -> _Layout:
        return _Layout(tuple(range(channels)), channels + padding)

    def __add__(self, other: _Layout) -> _Layout:
        shifted = (self.width + position for position in other.positions)
        return _Layout((*self.positions, *shifted), self.width + other.width)

    @property
    def padded(self) -> bool:
        return self.width > len(self.positions)

    def scatter(self, value: Tensor, dim: int) -> Tensor:
        """Move a tensor's channels to their positions; the others are zero."""
        shape = list(value.shape)
        shape[dim] = self.width
        return value.new_zeros(shape).index_copy(dim, torch.tensor(self.positions), value)


class _ConflictError(Exception):
    """The values in ``args`` cannot be padded because of a node that reads them."""


def pad_channels(graph: InferenceGraph, multiple: int) -> int:
    """Pad the output channels of convolutions to multiples of ``multiple``; concatenated convolutions together.

    A value stays as it is if it is read by anything but convolutions, PReLU, ReLU, pooling, upsampling, sums and
    concatenations, or if the terms of a sum would have different layouts. Returns the number of channels added.
    """
    padding = _padding(graph, multiple)
    while True:
        try:
            layouts = _layouts(graph, padding)
            break
        except _ConflictError as conflict:
            for value in conflict.args:
                for source in _sources(graph, value):
                    padding.pop(source, None)
    for node, layout in layouts.items():
        _pad_weights(graph, node, layouts)
        n, _, *size = graph.shapes[node]
        graph.shapes[node] = (n, layout.width, *size)
    return sum(padding.values())


def _padding(graph: InferenceGraph, multiple: int) -> dict[fx.Node, int]:
    """Convolution → number of channels to add, before conflicts are resolved."""
    padding = {}
    for node in graph.nodes:
        conv = graph.conv(node)
        if conv is not None and conv.groups == 1 and not _is_depthwise(conv):
            padding[node] = -conv.out_channels % multiple
    for node in graph.nodes:
        if graph.is_cat(node) and all(part in padding and len(part.users) == 1 for part in node.args[0]):
            # Together, because dilated branches have only a few channels each.
            total = sum(graph.conv(part).out_channels for part in node.args[0])
            padding |= dict.fromkeys(node.args[0], 0)
            padding[node.args[0][-1]] = -total % multiple
    return {node: count for node, count in padding.items() if count}


def _layouts(graph: InferenceGraph, padding: dict[fx.Node, int]) -> dict[fx.Node, _Layout]:
    """The layout of every value with 4 dimensions; raises _ConflictError."""
    layouts: dict[fx.Node, _Layout] = {}
    for node in graph.nodes:
        conv = graph.conv(node)
        if conv is not None and conv.groups == 1 and not _is_depthwise(conv):
            layouts[node] = _Layout.contiguous(conv.out_channels, padding.get(node, 0))
        elif _keeps_channels(graph, node) and node.args[0] in layouts:
            layouts[node] = layouts[node.args[0]]
        elif graph.is_add(node):
            first, second = (layouts.get(side) for side in node.args)
            if first != second:
                raise _ConflictError(*node.args)
            if first is not None:
                layouts[node] = first
        elif graph.is_cat(node):
            layouts[node] = sum((layouts[part] for part in node.args[0]), start=_Layout((), 0))
        else:
            padded = [value for value in node.all_input_nodes if value in layouts and layouts[value].padded]
            if padded and not _reads_size(node):
                raise _ConflictError(*padded)
            if len(graph.shapes.get(node, ())) == 4:
                layouts[node] = _Layout.contiguous(graph.shapes[node][1])
    return layouts


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Also of a single channel: a convolution between the padded vectors would multiply their lengths."""
    return is_depthwise(conv) or conv.in_channels == conv.out_channels == 1


def _keeps_channels(graph: InferenceGraph, node: fx.Node) -> bool:
    """Whether each output channel depends on its own input channel only, and zero gives zero."""
    conv = graph.conv(node)
    return (
        (conv is not None and _is_depthwise(conv))
        or graph.module_of(node, nn.PReLU) is not None
        or graph.is_function(node, {*POOLS, F.interpolate, F.relu})
    )


def _reads_size(node: fx.Node) -> bool:
    """Whether the node reads only the height and width of a value, as ``x.shape[-2]`` does."""
    indices = [user.args[1:] for user in node.users]
    return node.target in (getattr, "size") and all(index in ((-1,), (-2,), (2,), (3,)) for index in indices)


def _sources(graph: InferenceGraph, value: fx.Node) -> list[fx.Node]:
    """The convolutions that the padding of a value comes from."""
    sources, seen, waiting = [], set(), [value]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _keeps_channels(graph, node) or graph.is_add(node) or graph.is_cat(node):
            waiting += node.all_input_nodes
        elif graph.conv(node) is not None:
            sources.append(node)
    return sources


def _pad_weights(graph: InferenceGraph, node: fx.Node, layouts: dict[fx.Node, _Layout]) -> None:
    layout, conv, prelu = layouts[node], graph.conv(node), graph.module_of(node, nn.PReLU)
    if prelu is not None and layout.padded and prelu.num_parameters > 1:
        prelu.weight = nn.Parameter(layout.scatter(prelu.weight, 0), requires_grad=False)
        prelu.num_parameters = layout.width
    if conv is None:
        return
    weight, source = conv.weight, layouts.get(node.args[0])
    if _is_depthwise(conv):
        conv.groups = layout.width
    elif source is not None and source.padded:
        weight = source.scatter(weight, 1)
    bias = None if conv.bias is None else layout.scatter(conv.bias, 0)
    set_weights(conv, layout.scatter(weight, 0), bias)
