"""Pass: rewrite PReLUs as ReLUs and sums, which ONNX Runtime fuses into convolutions."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import nn

from prunekit.deployment.graph import InferenceGraph, is_depthwise
from prunekit.deployment.passes.fold_norms import Producer, find_producers, scale_output, set_weights

MAX_SLOPE = 0.95  # Closer to 1, too little precision is left in 1 − a.


def prelu_to_relu(graph: InferenceGraph) -> int:
    """Rewrite PReLUs of features (N, C, H, W): for slopes a ≤ 1, PReLU(y) = relu((1 − a)·y) + a·y.

    The factors go into the weights that compute y. A depthwise convolution is computed twice, with both factors; after
    other convolutions, a depthwise 1×1 convolution with the weights a/(1 − a) computes the second term from the first.
    A PReLU stays if one of its slopes is above 0.95, if anything but convolutions computes its input, or if its input
    has another user. Returns the number of PReLUs rewritten.
    """
    rewritten = 0
    for node in graph.nodes:
        prelu = graph.module_of(node, nn.PReLU)
        if prelu is None or float(prelu.weight.max()) > MAX_SLOPE or len(graph.shapes[node]) != 4:
            continue
        value, shape = node.args[0], graph.shapes[node]
        slope = prelu.weight.double().expand(shape[1])
        producers = find_producers(graph, value)
        if producers is None:
            continue
        conv = graph.conv(value)
        if conv is not None and is_depthwise(conv):
            linear = graph.insert_module(node, copy.deepcopy(conv), value.args, f"{value.target}_slope", shape)
            scale_output(graph, [Producer(linear, 0, False)], slope)
        else:
            pointwise = nn.Conv2d(shape[1], shape[1], 1, groups=shape[1], bias=False)
            set_weights(pointwise, (slope / (1 - slope)).view(-1, 1, 1, 1), None)
            linear = graph.insert_module(node, pointwise, (value,), f"{node.target}_slope", shape)
        scale_output(graph, producers, 1 - slope)
        relu = graph.insert_function(node, F.relu, (value,), shape)
        graph.replace(node, graph.insert_sum(node, [linear, relu]))
        rewritten += 1
    graph.recompile()
    return rewritten
