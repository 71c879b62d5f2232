"""Channels padded with zeros to a multiple of what the processor's vectors hold.

Learned channel counts are odd numbers, and convolutions in channels-last or blocked memory pay for every channel that
fills no whole vector. A padded channel is zero from the convolution that makes it to the weights, zero too, that read
it; so nothing changes but the speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import POOLS, Graph, is_depthwise
from prunekit.deployment.passes.fold_norms import set_weights


@dataclass(frozen=True)
class _Layout:
    """Where the channels of a value stand: ``places[c]`` of ``width``."""

    places: tuple[int, ...]
    width: int

    @staticmethod
    def plain(channels: int, padding: int = 0) -> _Layout:
        return _Layout(tuple(range(channels)), channels + padding)

    @property
    def padded(self) -> bool:
        return self.width > len(self.places)


class _Conflict(Exception):
    """A value cannot be padded where these nodes read it."""

    def __init__(self, *values: fx.Node):
        self.values = values


def pad_channels(graph: Graph, multiple: int) -> int:
    """Pad the output channels of convolutions to multiples of ``multiple``; how many channels were added.

    Values that something else reads than convolutions, PReLUs, ReLUs, poolings, up-samplings, sums and concatenations
    stay as they are.
    """
    padding = _wanted(graph, multiple)
    while True:
        try:
            layouts = _layouts(graph, padding)
            break
        except _Conflict as conflict:
            for value in conflict.values:
                for source in _sources(graph, value):
                    padding.pop(source, None)
    for node in graph.nodes:
        _widen(graph, node, layouts)
    for node, layout in layouts.items():
        n, _, *sides = graph.shapes[node]
        graph.shapes[node] = (n, layout.width, *sides)
    return sum(padding.values())


def _wanted(graph: Graph, multiple: int) -> dict[fx.Node, int]:
    """How many channels to add to each convolution."""
    padding = {}
    for node in graph.nodes:
        conv = graph.conv(node)
        if conv is not None and conv.groups == 1:
            padding[node] = -conv.out_channels % multiple
    for node in graph.nodes:
        if graph.is_cat(node) and all(part in padding and len(part.users) == 1 for part in node.args[0]):
            # Side by side they fill vectors together: the dilations of one branch have a few channels each.
            total = sum(graph.conv(part).out_channels for part in node.args[0])
            padding |= dict.fromkeys(node.args[0], 0)
            padding[node.args[0][-1]] = -total % multiple
    return {node: count for node, count in padding.items() if count}


def _layouts(graph: Graph, padding: dict[fx.Node, int]) -> dict[fx.Node, _Layout]:
    """The layout of every value of four dimensions.

    Raises:
        _Conflict: a padded value where nothing is known of what reads it, or sides of a sum that differ.
    """
    layouts: dict[fx.Node, _Layout] = {}
    for node in graph.nodes:
        conv = graph.conv(node)
        read = [value for value in node.all_input_nodes if value in layouts]
        if conv is not None and is_depthwise(conv):
            layouts[node] = layouts[node.args[0]]
        elif conv is not None and conv.groups == 1:
            layouts[node] = _Layout.plain(conv.out_channels, padding.get(node, 0))
        elif graph.is_add(node):
            sides = [layouts.get(side) for side in node.args]
            if sides[0] != sides[1]:
                raise _Conflict(*node.args)
            if sides[0] is not None:
                layouts[node] = sides[0]
        elif graph.is_cat(node):
            layouts[node] = _side_by_side([layouts[part] for part in node.args[0]])
        elif _channelwise(graph, node):
            layouts[node] = layouts[node.args[0]]
        else:
            held = [value for value in read if layouts[value].padded and not _asks_sides(node)]
            if held:
                raise _Conflict(*held)
            if len(graph.shapes.get(node, ())) == 4:
                layouts[node] = _Layout.plain(graph.shapes[node][1])
    return layouts


def _side_by_side(parts: list[_Layout]) -> _Layout:
    places: list[int] = []
    width = 0
    for part in parts:
        places += [width + place for place in part.places]
        width += part.width
    return _Layout(tuple(places), width)


def _channelwise(graph: Graph, node: fx.Node) -> bool:
    """Whether zero channels stay zero in it and touch no others."""
    return graph.called(node, nn.PReLU) is not None or graph.is_call(node, {*POOLS, F.interpolate, F.relu})


def _asks_sides(node: fx.Node) -> bool:
    """Whether the node looks at the height and width of a value alone: ``x.shape`` and what is taken of it."""
    taken = [user.args[1:] for user in node.users]
    return node.target in (getattr, "size") and all(one in ((-1,), (-2,), (2,), (3,)) for one in taken)


def _sources(graph: Graph, value: Any) -> list[fx.Node]:
    """The convolutions whose padding this value has."""
    conv = graph.conv(value)
    if conv is not None and not is_depthwise(conv):
        return [value]
    if graph.is_add(value) or graph.is_cat(value) or conv is not None or _channelwise(graph, value):
        return [source for one in value.all_input_nodes for source in _sources(graph, one)]
    return []


def _widen(graph: Graph, node: fx.Node, layouts: dict[fx.Node, _Layout]) -> None:
    """Put the weights of a convolution or a PReLU where its channels stand."""
    conv, prelu = graph.conv(node), graph.called(node, nn.PReLU)
    if prelu is not None and node in layouts and layouts[node].padded and prelu.num_parameters > 1:
        prelu.weight = nn.Parameter(_spread(prelu.weight, layouts[node], 0), requires_grad=False)
        prelu.num_parameters = layouts[node].width
    if conv is None or node not in layouts:
        return
    source, target = layouts.get(node.args[0]), layouts[node]
    weight = conv.weight
    if is_depthwise(conv):
        conv.groups = target.width
    elif source is not None and source.padded:
        weight = _spread(weight, source, 1)
    bias = None if conv.bias is None else _spread(conv.bias, target, 0)
    set_weights(conv, _spread(weight, target, 0), bias)


def _spread(value: Tensor, layout: _Layout, axis: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = layout.width
    return value.new_zeros(shape).index_copy(axis, torch.tensor(layout.places), value)
