import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.pruning.graph.axis_terms import Cat, Fixed, Leaf, Prod, cat, factor, leaves, prod, spans, split, unify
from prunekit.pruning.graph.rules.views import reshaped
from prunekit.pruning.plan import Span


def dead_entries(term, dead):
    """The entries of an axis that disappear with the given channels of its leaves."""
    mask = np.zeros(term.size, bool)
    for span in spans(term):
        layout = Span(axis=0, offset=span.offset, stride=span.stride, repeats=span.repeats)
        mask[layout.entries(np.array(sorted(dead.get(span.leaf, ())), int))] = True
    return mask


def dead_places(axes, dead):
    """The entries of a tensor that disappear."""
    mask = np.zeros([term.size for term in axes], bool)
    for axis, term in enumerate(axes):
        sides = [-1 if other == axis else 1 for other in range(len(axes))]
        mask |= dead_entries(term, dead).reshape(sides)
    return mask


def some_dead(axes, draw):
    return {leaf: set(draw(st.sets(st.integers(0, leaf.size - 1)))) for term in axes for leaf in leaves(term)}


@st.composite
def terms(draw, depth=2):
    kind = draw(st.sampled_from(["leaf", "fixed", "cat", "prod"] if depth else ["leaf", "fixed"]))
    if kind in ("leaf", "fixed"):
        return (Leaf if kind == "leaf" else Fixed)(draw(st.integers(2, 6)))
    parts = [draw(terms(depth - 1)) for _ in range(2)]
    return cat(parts) if kind == "cat" else prod(parts)


def divisors(number):
    return [side for side in range(1, number + 1) if number % side == 0]


@given(st.data())
def test_reshape_moves_entries_as_numpy_does(data):
    axes = [data.draw(terms(1)) for _ in range(data.draw(st.integers(1, 3)))]
    left, shape = math.prod(term.size for term in axes), []
    for _ in range(data.draw(st.integers(0, 3))):
        shape.append(data.draw(st.sampled_from(divisors(left))))
        left //= shape[-1]
    shape.append(left)
    after = reshaped(axes, shape)
    if after is None:
        return
    assert [term.size for term in after] == shape
    dead = some_dead([*axes, *after], data.draw)
    dead = {leaf: channels for leaf, channels in dead.items() if leaf.reason is None}
    assert (dead_places(axes, dead).reshape(shape) == dead_places(after, dead)).all()


@given(st.data())
def test_terms_that_are_unified_are_the_same_or_locked(data):
    a, b = data.draw(terms()), data.draw(terms())
    if a.size != b.size:
        b = cat([b, Leaf(a.size - b.size)]) if a.size > b.size else b
        a = a if a.size == b.size else cat([a, Leaf(b.size - a.size)])
    unify(a, b, "a sum")
    free = [leaf for term in (a, b) for leaf in leaves(term) if leaf.reason is None]
    dead = {leaf: set(data.draw(st.sets(st.integers(0, leaf.size - 1)))) for leaf in free}
    assert (dead_entries(a, dead) == dead_entries(b, dead)).all()


@given(terms(), st.data())
def test_split_keeps_the_order_of_entries(term, data):
    size = data.draw(st.integers(0, term.size))
    parts = split(term, size)
    if parts is not None:
        dead = some_dead([term], data.draw)
        assert [part.size for part in parts] == [size, term.size - size]
        assert (np.concatenate([dead_entries(part, dead) for part in parts]) == dead_entries(term, dead)).all()


@given(terms(), st.data())
def test_factors_make_the_term(term, data):
    inner = data.draw(st.sampled_from(divisors(term.size)))
    parts = factor(term, inner)
    if parts is not None:
        dead = {leaf: own for leaf, own in some_dead([term], data.draw).items() if leaf.reason is None}
        assert (dead_places(parts, dead).ravel() == dead_entries(term, dead)).all()


def test_leaf_of_two_reshapes_has_the_factors_of_both():
    leaf = Leaf(24)
    factor(leaf, 4), factor(leaf, 12)
    assert [span.leaf.size for span in spans(leaf)] == [2, 3, 4]


def test_heads_of_queries_keys_and_values():
    rows = Leaf(24)
    three, heads, channels = reshaped([rows], (3, 2, 4))
    assert [(s.offset, s.stride, s.repeats) for s in spans(rows)] == [(0, 8, ()), (0, 4, ((3, 8),)), (0, 1, ((6, 4),))]
    assert [s.leaf for s in spans(rows)] == [three, heads, channels]


def test_concatenation_is_not_a_product_unless_its_parts_are_alike():
    a, b = Leaf(3), Leaf(5)
    assert factor(cat([a, b]), 4) is not None and isinstance(cat([a, b]), Cat)
    # The first block of four has a and the first of b, the second the others of b.
    assert {leaf.size for leaf in leaves(a)} <= {3, 1, 2}


@pytest.mark.parametrize("term", [Leaf(1), Fixed(1)])
def test_single_entry_is_left_out_of_products(term):
    other = Leaf(4)
    assert prod([term, other]) is other and not isinstance(prod([term, other]), Prod)
