"""Pass: fold BatchNorms into the convolutions before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import InferenceGraph, parse_pooling


@dataclass(frozen=True)
class Producer:
    """A convolution that computes some channels of a value, alone or as a term of a sum."""

    node: fx.Node
    start: int  # index of its first output channel among the channels of the value
    takes_shift: bool  # whether a constant added to the value goes here; in a sum, only one term takes it


def fold_norms(graph: InferenceGraph) -> tuple[list[str], list[str]]:
    """Fold each ``nn.BatchNorm2d`` into the convolutions that compute its input.

    Between convolution and norm there may be sums, concatenations of channels, average pooling, and bilinear or nearest
    upsampling. A norm stays if anything else computes its input, if another node reads a value in between, or if it has
    no running statistics. Returns the names of the folded norms, and of those that stay.
    """
    folded, kept = [], []
    for node in graph.nodes:
        norm = graph.module_of(node, nn.BatchNorm2d)
        if norm is None:
            continue
        producers = find_producers(graph, node.args[0]) if norm.running_mean is not None else None
        if producers is None:
            kept.append(node.target)
            continue
        scale_output(graph, producers, *_scale_and_shift(norm))
        folded.append(node.target)
        graph.replace(node, node.args[0])
    graph.recompile()
    return folded, kept


def find_producers(
    graph: InferenceGraph, node: fx.Node, start: int = 0, takes_shift: bool = True
) -> list[Producer] | None:
    """The convolutions that compute a value; None if anything else does, or if a value has several users."""
    if len(node.users) != 1:
        return None
    if graph.conv(node) is not None:
        return [Producer(node, start, takes_shift)]
    if _averages(graph, node):
        return find_producers(graph, node.args[0], start, takes_shift)
    if graph.is_add(node):
        parts = [find_producers(graph, side, start, takes_shift and i == 0) for i, side in enumerate(node.args)]
    elif graph.is_cat(node):
        parts = []
        for part in node.args[0]:
            parts.append(find_producers(graph, part, start, takes_shift))
            start += graph.shapes[part][1]
    else:
        return None
    return None if None in parts else [producer for part in parts for producer in part]


def scale_output(graph: InferenceGraph, producers: list[Producer], scale: Tensor, shift: Tensor | None = None) -> None:
    """Multiply a value by ``scale`` and add ``shift``, both (C,) float64, by changing the weights of its producers."""
    for producer in producers:
        conv = graph.conv(producer.node)
        channels = slice(producer.start, producer.start + conv.out_channels)
        weight = conv.weight.double() * scale[channels].view(-1, 1, 1, 1)
        bias = None if conv.bias is None else conv.bias.double() * scale[channels]
        if producer.takes_shift and shift is not None and shift[channels].any():
            bias = shift[channels] if bias is None else bias + shift[channels]
        set_weights(conv, weight, bias)


def set_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Replace the weights of a convolution, in its own dtype, and update its channel counts."""
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    conv.out_channels = len(weight)
    conv.in_channels = weight.shape[1] * conv.groups


def _averages(graph: InferenceGraph, node: fx.Node) -> bool:
    """Whether each output is a weighted mean of inputs, so that a scale and a shift pass through."""
    if graph.is_function(node, [F.interpolate]):
        return node.kwargs.get("mode", "nearest") in ("bilinear", "nearest")
    # Not with a divisor of its own, which scales, or with padding, whose zeros a shift does not reach.
    return graph.is_function(node, [F.avg_pool2d]) and parse_pooling(node) is not None


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    weight = torch.ones(norm.num_features) if norm.weight is None else norm.weight
    bias = torch.zeros(norm.num_features) if norm.bias is None else norm.bias
    scale = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, bias.double() - norm.running_mean.double() * scale
