"""PReLU in a form that a runtime keeps in blocked memory.

ONNX Runtime's fast convolutions work on channels in blocks, and fuse a ReLU and a sum; a PReLU they do not know, so
before each all is brought back into plain order, and after it into blocks again, on one thread. But

    PReLU_a(y) = relu((1 − a)·y) + a·y        for a ≤ 1,

and both factors go into the weights of what makes y: a depthwise convolution is done twice, once with the ReLU and once
with the sum; anything else is made once with the factor 1 − a, and a depthwise 1×1 convolution gives it its a/(1 − a).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prunekit.deployment.graph import Graph, is_depthwise
from prunekit.deployment.passes.fold_norms import parts_of, scale_parts, set_weights

STEEPEST = 0.95  # a slope above this leaves too little in 1 − a


def relu_form(graph: Graph) -> int:
    """Rewrite each PReLU whose slopes allow it; how many were."""
    rewritten = 0
    for node in graph.nodes:
        prelu = graph.called(node, nn.PReLU)
        if prelu is None or float(prelu.weight.max()) > STEEPEST or len(graph.shapes[node]) != 4:
            continue
        value, slope = node.args[0], prelu.weight.double().expand(graph.shapes[node][1])
        conv = graph.conv(value)
        if conv is not None and is_depthwise(conv) and len(value.users) == 1:
            linear = _twin(graph, node, value, conv, slope)
            _scale(conv, 1 - slope)
        else:
            parts = parts_of(graph, value)
            if parts is None:
                continue
            scale_parts(graph, parts, 1 - slope)
            pointwise = nn.Conv2d(len(slope), len(slope), 1, groups=len(slope), bias=False)
            set_weights(pointwise, (slope / (1 - slope)).view(-1, 1, 1, 1), None)
            linear = graph.insert(node, pointwise, (value,), f"{node.target}_slope")
        graph.shapes[linear] = graph.shapes[node]
        with graph.module.graph.inserting_before(node):
            bent = graph.module.graph.call_function(F.relu, (value,))
            total = graph.module.graph.call_function(torch.add, (linear, bent))
        graph.shapes[bent] = graph.shapes[total] = graph.shapes[node]
        graph.drop(node, total)
        rewritten += 1
    graph.finish()
    return rewritten


def _twin(graph: Graph, before: fx.Node, value: fx.Node, conv: nn.Conv2d, slope: Tensor) -> fx.Node:
    """The same convolution once more, times the slope."""
    twin = copy.deepcopy(conv)
    _scale(twin, slope)
    return graph.insert(before, twin, value.args, f"{value.target}_slope")


def _scale(conv: nn.Conv2d, factor: Tensor) -> None:
    bias = None if conv.bias is None else conv.bias.double() * factor
    set_weights(conv, conv.weight.double() * factor.view(-1, 1, 1, 1), bias)
