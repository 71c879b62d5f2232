"""Passes: merge convolutions whose outputs are added, and equal pooling and upsampling calls."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import fx, nn

from prunekit.deployment.graph import PURE_FUNCTIONS, InferenceGraph, parse_pooling
from prunekit.deployment.passes.fold_norms import set_weights


def share_pooling(graph: InferenceGraph) -> int:
    """Compute equal pooling and upsampling once, and max-pooling by 2k from that by k.

    The second: square windows, no overlap, ``ceil_mode``. Returns the number of calls removed or made smaller.
    """
    saved = _merge_equal_calls(graph)
    pools: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in graph.nodes:
        if not graph.is_function(node, [F.max_pool2d]):
            continue
        pool = parse_pooling(node)
        if pool is None or not pool.ceil_mode or pool.stride != pool.kernel or len(set(pool.kernel)) > 1:
            continue
        kernel = pool.kernel[0]
        half = pools.get((node.args[0], kernel // 2)) if kernel % 2 == 0 else None
        pools[node.args[0], kernel] = node
        if half is not None:
            node.args, node.kwargs = (half, 2), {"ceil_mode": True}
            saved += 1
    graph.recompile()
    return saved


def _merge_equal_calls(graph: InferenceGraph) -> int:
    seen: dict[Hashable, fx.Node] = {}
    saved = 0
    for node in graph.nodes:
        arithmetic = node not in graph.shapes and node.op == "call_function"
        if not (graph.is_function(node, PURE_FUNCTIONS) or arithmetic):
            continue
        key = repr((node.target, node.args, sorted(node.kwargs.items())))
        if key in seen:
            saved += node in graph.shapes
            graph.replace(node, seen[key])
        else:
            seen[key] = node
    return saved


def merge_sums(graph: InferenceGraph) -> int:
    """Merge convolutions whose outputs are added into one convolution of their concatenated inputs.

    Applies to convolutions with the same kernel size, stride, padding and dilation, without groups, whose inputs have
    the same height and width and whose outputs have no other user. Returns the number of convolutions removed.
    """
    merged = 0
    for node in graph.nodes:
        if not graph.is_outermost_sum(node):
            continue
        terms = graph.terms(node)
        mergeable: dict[Hashable, list[fx.Node]] = {}
        for term in terms:
            conv = graph.conv(term)
            if conv is not None and conv.groups == 1 and len(term.users) == 1:
                key = conv.kernel_size, conv.stride, conv.padding, conv.dilation, graph.shapes[term.args[0]][2:]
                mergeable.setdefault(key, []).append(term)
        new_terms = list(terms)
        for convs in mergeable.values():
            if len(convs) > 1:
                new_terms = [_merge_terms(graph, node, convs), *(term for term in new_terms if term not in convs)]
        if len(new_terms) < len(terms):
            merged += len(terms) - len(new_terms)
            graph.replace(node, graph.insert_sum(node, new_terms))
    graph.recompile()
    return merged


def _merge_terms(graph: InferenceGraph, before: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    convs = [graph.conv(node) for node in nodes]
    first, weight = convs[0], torch.cat([conv.weight for conv in convs], 1)
    biases = [conv.bias for conv in convs if conv.bias is not None]
    merged = nn.Conv2d(1, 1, first.kernel_size, first.stride, first.padding, first.dilation, bias=False)
    set_weights(merged, weight, torch.stack(biases).sum(0) if biases else None)
    inputs = [node.args[0] for node in nodes]
    n, _, *size = graph.shapes[inputs[0]]
    joined = graph.insert_function(before, torch.cat, (inputs, 1), (n, weight.shape[1], *size))
    return graph.insert_module(before, merged, (joined,), f"{nodes[0].target}_sum", graph.shapes[nodes[0]])
