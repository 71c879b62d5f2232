"""Paths merged: poolings computed once, convolutions that meet in a sum or read the same input made one.

A gOctConv as one convolution a path reads each input once for every output, and writes each output once for every
input. Two paths at one resolution that meet in a sum are one convolution of their concatenated inputs; two that read
the same input are one with their outputs side by side.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import fx, nn

from prunekit.deployment.graph import PURE, Graph, pooling
from prunekit.deployment.passes.fold_norms import set_weights


def share_poolings(graph: Graph) -> int:
    """Compute poolings and up-samplings of the same thing once, and a max-pooling by 4 from that by 2, where there is
    one; how many were saved or made smaller."""
    saved = _common(graph)
    pools: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in graph.nodes:
        if not graph.is_call(node, [F.max_pool2d]):
            continue
        pool = pooling(node)
        if pool is None or not pool.ceil or pool.stride != pool.kernel or len(set(pool.kernel)) > 1:
            continue
        kernel = pool.kernel[0]
        half = pools.get((node.args[0], kernel // 2)) if kernel % 2 == 0 else None
        pools[node.args[0], kernel] = node
        if half is not None:
            # With sides rounded up, the windows of windows are the windows.
            node.args, node.kwargs = (half, 2), {"ceil_mode": True}
            saved += 1
    graph.finish()
    return saved


def _common(graph: Graph) -> int:
    """One node for all that call the same pure function of the same things."""
    seen: dict[Hashable, fx.Node] = {}
    saved = 0
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        arithmetic = node not in graph.shapes and node.op == "call_function"
        if not (graph.is_call(node, PURE) or arithmetic):
            continue
        key = repr((node.op, node.target, node.args, sorted(node.kwargs.items())))
        if key in seen:
            saved += node in graph.shapes
            graph.drop(node, seen[key])
        else:
            seen[key] = node
    return saved


def merge_sums(graph: Graph) -> int:
    """Make convolutions that meet in a sum one convolution of their concatenated inputs; how many went."""
    merged = 0
    for node in graph.nodes:
        if not graph.is_whole_sum(node):
            continue
        terms = graph.terms(node)
        alike: dict[Hashable, list[fx.Node]] = {}
        for term in terms:
            conv = graph.conv(term)
            if conv is not None and conv.groups == 1 and len(term.users) == 1:
                alike.setdefault((_kind(conv), graph.shapes[term.args[0]][2:]), []).append(term)
        rest = list(terms)
        for convs in alike.values():
            if len(convs) < 2:
                continue
            whole = _joined(graph, node, convs)
            rest = [term for term in rest if term not in convs]
            rest.insert(0, whole)
            merged += len(convs) - 1
        if len(rest) == len(terms):
            continue
        total = rest[0]
        for term in rest[1:]:
            with graph.module.graph.inserting_before(node):
                shape, total = graph.shapes[total], graph.module.graph.call_function(torch.add, (total, term))
            graph.shapes[total] = shape
        graph.drop(node, total)
    graph.finish()
    return merged


def _joined(graph: Graph, before: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    convs = [graph.conv(node) for node in nodes]
    weight = torch.cat([conv.weight for conv in convs], 1)
    biases = [conv.bias for conv in convs if conv.bias is not None]
    whole = _like(convs[0], weight, torch.stack(biases).sum(0) if biases else None)
    inputs = [node.args[0] for node in nodes]
    with graph.module.graph.inserting_before(before):
        joined = graph.module.graph.call_function(torch.cat, (inputs, 1))
    n, _, *sides = graph.shapes[inputs[0]]
    graph.shapes[joined] = (n, weight.shape[1], *sides)
    made = graph.insert(before, whole, (joined,), f"{nodes[0].target}_sum")
    graph.shapes[made] = graph.shapes[nodes[0]]
    return made


def merge_inputs(graph: Graph) -> int:
    """Make convolutions that read the same input one with their outputs side by side; how many went."""
    merged = 0
    for node in graph.nodes:
        alike: dict[Hashable, list[fx.Node]] = {}
        for user in node.users:
            conv = graph.conv(user)
            if conv is not None and conv.groups == 1:
                alike.setdefault(_kind(conv), []).append(user)
        for users in alike.values():
            if len(users) > 1:
                _side_by_side(graph, sorted(users, key=graph.nodes.index))
                merged += len(users) - 1
    graph.finish()
    return merged


def _side_by_side(graph: Graph, nodes: list[fx.Node]) -> None:
    convs = [graph.conv(node) for node in nodes]
    weight = torch.cat([conv.weight for conv in convs])
    bias = None
    if any(conv.bias is not None for conv in convs):
        bias = torch.cat([torch.zeros(c.out_channels) if c.bias is None else c.bias for c in convs])
    made = graph.insert(nodes[0], _like(convs[0], weight, bias), nodes[0].args, f"{nodes[0].target}_both")
    n, _, *sides = graph.shapes[nodes[0]]
    graph.shapes[made] = (n, len(weight), *sides)
    start = 0
    for node, conv in zip(nodes, convs, strict=True):
        with graph.module.graph.inserting_after(made):
            part = graph.module.graph.call_function(torch.narrow, (made, 1, start, conv.out_channels))
        graph.shapes[part] = graph.shapes[node]
        start += conv.out_channels
        graph.drop(node, part)


def _kind(conv: nn.Conv2d) -> Hashable:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


def _like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    made = nn.Conv2d(1, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)
    set_weights(made, weight, bias)
    return made
