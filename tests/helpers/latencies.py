"""Latencies that a formula gives, instead of a machine."""

import math

from torch import nn

from prunekit.deployment.bench.variants import random_variants
from prunekit.flops import count_modules
from prunekit.pruning.selection.latency_model import LatencyTable, Variant
from prunekit.pruning.surgery.copies import clone
from prunekit.pruning.surgery.cutter import Cutter


def synthetic_ms(model, shape, vector=4):
    """Milliseconds of a model: 0.01 per layer, and multiply-adds with the channels rounded up to whole vectors."""
    counts, total = count_modules(model, shape)[0], 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and counts[name].macs:
            width, read = module.weight.shape[:2]
            rounded = math.prod(math.ceil(length / vector) * vector for length in (width, read))
            total += 0.01 + 1e-7 * counts[name].macs * rounded / (width * read)
    return total


def cut(model, groups, kept):
    copied = clone(model)
    cutter = Cutter(copied, groups)
    dead = {g.id: set(range(kept[g.id], g.channels)) for g in groups if g.reason is None}
    cutter.cut(copied, *cutter.complete(dead))
    return copied


def synthetic_table(model, groups, shape, count=50, vector=4):
    variants = [
        Variant(kept=kept, ms=synthetic_ms(cut(model, groups, kept), shape, vector))
        for kept in random_variants(model, groups, count)
    ]
    return LatencyTable(runtime="formula", size=list(shape), variants=variants)
