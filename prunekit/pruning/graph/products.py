"""Products: over which channels each operation multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prunekit.operations.multiply_adds import is_counted, loops
from prunekit.pruning.graph.axis_terms import Fixed, Leaf, Prod, Term, resolve, spans
from prunekit.pruning.graph.recorder import Op
from prunekit.pruning.graph.rules.base import AxisGraph
from prunekit.pruning.plan import Product


def products_of(op: Op, graph: AxisGraph) -> Iterator[tuple[Leaf, Product, int]]:
    """Yield each leaf over which an operation multiplies, where, and the multiply-adds of the whole operation."""
    for part, loop in enumerate(loops(op.name, op.args, op.outputs[0]) if is_counted(op.name) else ()):
        multiply_adds = math.prod(value.shape[axis] for value, axis in loop)
        terms = [graph.virtual.get((value.name or "", axis), value.axes[axis]) for value, axis in loop]
        factors = [factor for term in terms for factor in _factors(term)]
        for number, factor in enumerate(factors):
            for span in spans(factor):
                layout = {"axis": number, "offset": span.offset, "stride": span.stride, "repeats": span.repeats}
                place = {"module": op.module, "operation": op.name, "call": op.number, "part": part}
                # Not validated: a dense network has thousands, all of them from here.
                product = Product.model_construct(length=factor.size, **place, **layout)
                yield span.leaf, product, multiply_adds


def _factors(term: Term) -> Iterator[Term]:
    """Yield what an axis is a product of, without numbers, such as that of the images."""
    term = resolve(term)
    if isinstance(term, Prod):
        for factor in term.factors:
            yield from _factors(factor)
    elif not isinstance(term, Fixed):
        yield term
