"""Latencies that a formula gives, instead of a machine."""

import math

from torch import nn

from prunekit.deployment.bench.variants import random_variants
from prunekit.flops import count_modules
from prunekit.pruning.selection.latency_model import LatencyTable, Variant
from prunekit.pruning.surgery.copies import clone
from prunekit.pruning.surgery.cutter import Cutter


def synthetic_ms(model, shape):
    """Milliseconds of a model: 0.01 per layer, and multiply-adds with the output channels rounded up to 8."""
    counts, total = count_modules(model, shape)[0], 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and counts[name].macs:
            width = len(module.weight)
            total += 0.01 + 1e-7 * counts[name].macs * math.ceil(width / 8) * 8 / width
    return total


def cut(model, groups, kept):
    copied = clone(model)
    cutter = Cutter(copied, groups)
    dead = {g.id: set(range(kept[g.id], g.channels)) for g in groups if g.reason is None}
    cutter.cut(copied, *cutter.complete(dead))
    return copied


def synthetic_table(model, groups, shape, count=50):
    variants = [
        Variant(kept=kept, ms=synthetic_ms(cut(model, groups, kept), shape))
        for kept in random_variants(model, groups, count)
    ]
    return LatencyTable(runtime="formula", size=list(shape), variants=variants)
