"""Norms folded into the convolutions before them.

A BatchNorm in eval mode multiplies each channel by a number and adds one. Both may move against the stream through
all that is linear and treats channels alike: a sum of branches (the product to both sides, the number to one), a
bilinear or nearest up-sampling and an average pooling (their weights add up to 1), a concatenation. So the norm of a
gOctConv, which stands behind the sum of its paths, goes into the convolutions of the paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import Graph


@dataclass(frozen=True)
class Part:
    """A convolution whose outputs are some of the norm's channels.

    Attributes:
        start: which of the norm's channels its first output is.
        shifted: whether what the norm adds goes here; of the sides of a sum, to one.
    """

    node: fx.Node
    start: int
    shifted: bool


def fold_norms(graph: Graph) -> tuple[list[str], list[str]]:
    """Fold each norm that can be folded; what was computed in float64 is stored in the convolution's precision.

    Returns:
        names of the norms that went, and of those that stay.
    """
    folded, left = [], []
    for node in graph.nodes:
        norm = graph.called(node, nn.BatchNorm2d)
        if norm is None:
            continue
        parts = parts_of(graph, node.args[0]) if norm.running_mean is not None else None
        if parts is None:
            left.append(node.target)
            continue
        scale_parts(graph, parts, *_affine(norm))
        folded.append(node.target)
        graph.drop(node, node.args[0])
    graph.finish()
    return folded, left


def parts_of(graph: Graph, node: fx.Node) -> list[Part] | None:
    """The convolutions that make up a value with one reader; None where it is made otherwise."""
    return _parts(graph, node, 0, True)


def scale_parts(graph: Graph, parts: list[Part], scale: Tensor, shift: Tensor | None = None) -> None:
    """Multiply a value by ``scale`` and add ``shift``, both (C,) float64, in the convolutions that make it up."""
    for part in parts:
        _absorb(graph.conv(part.node), part, scale, torch.zeros_like(scale) if shift is None else shift)


def _parts(graph: Graph, node: fx.Node, start: int, shifted: bool) -> list[Part] | None:
    if len(node.users) != 1:
        return None
    if graph.conv(node) is not None:
        return [Part(node, start, shifted)]
    if graph.is_add(node):
        sides = [_parts(graph, node.args[0], start, shifted), _parts(graph, node.args[1], start, False)]
    elif _averages(graph, node):
        return _parts(graph, node.args[0], start, shifted)
    elif graph.is_cat(node):
        sides = []
        for part in node.args[0]:
            sides.append(_parts(graph, part, start, shifted))
            start += graph.shapes[part][1]
    else:
        return None
    return None if None in sides else [part for side in sides for part in side]


def _averages(graph: Graph, node: fx.Node) -> bool:
    """Whether each value of the node is a weighted mean of values of its input."""
    if graph.is_call(node, [F.interpolate]):
        return node.kwargs.get("mode", "nearest") in ("bilinear", "nearest")
    return graph.is_call(node, [F.avg_pool2d]) and len(node.args) <= 2 and "padding" not in node.kwargs


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What the norm multiplies by and what it adds, (C,) float64."""
    weight = torch.ones(norm.num_features) if norm.weight is None else norm.weight
    bias = torch.zeros(norm.num_features) if norm.bias is None else norm.bias
    scale = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, bias.double() - norm.running_mean.double() * scale


def _absorb(conv: nn.Conv2d, part: Part, scale: Tensor, shift: Tensor) -> None:
    scale, shift = (value[part.start : part.start + conv.out_channels] for value in (scale, shift))
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    bias = None if conv.bias is None else conv.bias.double() * scale
    if part.shifted and shift.any():
        bias = shift if bias is None else bias + shift
    set_weights(conv, weight, bias)


def set_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Give a convolution other weights, in its own precision."""
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    conv.out_channels = len(weight)
    conv.in_channels = weight.shape[1] * conv.groups
