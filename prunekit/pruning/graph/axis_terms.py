"""Axes of tensors as terms: what each entry of an axis is, and which entries can only be pruned together.

A term is a ``Leaf`` (independent channels), ``Fixed`` (entries that are never pruned, such as positions and images), a
``Cat`` (terms side by side), or a ``Prod`` (terms merged by a reshape, the outermost first). An entry of a product
disappears with any of its factors. Terms are unified like types: the two sides of a sum have the same term from then
on. A reshape or a concatenation on one side refines the leaves of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class Leaf:
    """Channels that are pruned one by one. It may be refined to another term later."""

    __slots__ = ("reason", "size", "term")

    def __init__(self, size: int, reason: str | None = None):
        self.size = size
        self.reason = reason  # why it cannot be pruned
        self.term: Term | None = None  # what it was refined to


@dataclass(frozen=True, eq=False)
class Fixed:
    size: int


@dataclass(frozen=True, eq=False)
class Cat:
    parts: tuple[Term, ...]
    size: int


@dataclass(frozen=True, eq=False)
class Prod:
    factors: tuple[Term, ...]  # the outermost first
    size: int


Term = Leaf | Fixed | Cat | Prod


def resolve(term: Term) -> Term:
    """Return what a term was refined to; its own parts may have been refined, too."""
    while isinstance(term, Leaf) and term.term is not None:
        if isinstance(term.term, Leaf) and term.term.term is not None:
            term.term = term.term.term
        term = term.term
    return term


def cat(parts: Sequence[Term]) -> Term:
    """Terms side by side; neighbors that are fixed become one."""
    flat: list[Term] = []
    for part in map(resolve, parts):
        for own in part.parts if isinstance(part, Cat) else (part,):
            if not own.size:
                continue
            if isinstance(own, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size + own.size)
            else:
                flat.append(own)
    if len(flat) == 1:
        return flat[0]
    return Cat(tuple(flat), sum(part.size for part in flat)) if flat else Fixed(0)


def prod(factors: Sequence[Term]) -> Term:
    """Terms merged into one axis, the outermost first. Factors of one entry are left out, unless all are."""
    flat: list[Term] = []
    for factor in map(resolve, factors):
        for own in factor.factors if isinstance(factor, Prod) else (factor,):
            if own.size == 1:
                lock(own, "one channel that is merged with other entries")
            elif isinstance(own, Fixed) and flat and isinstance(flat[-1], Fixed):
                flat[-1] = Fixed(flat[-1].size * own.size)
            else:
                flat.append(own)
    if len(flat) == 1:
        return flat[0]
    return Prod(tuple(flat), math.prod(factor.size for factor in flat)) if flat else Fixed(1)


def leaves(term: Term) -> Iterator[Leaf]:
    """Yield the leaves of a term, from the first entry on."""
    stack = [term]
    while stack:
        term = resolve(stack.pop())
        if isinstance(term, Leaf):
            yield term
        elif isinstance(term, Cat):
            stack += reversed(term.parts)
        elif isinstance(term, Prod):
            stack += reversed(term.factors)


def parts_of(term: Term) -> Iterator[Term]:
    """Yield the terms that are side by side in a term."""
    term = resolve(term)
    if isinstance(term, Cat):
        for part in term.parts:
            yield from parts_of(part)
    else:
        yield term


def lock(term: Term, reason: str) -> None:
    """Make all channels of a term unprunable; the first reason stays."""
    for leaf in leaves(term):
        leaf.reason = leaf.reason or reason


def bind(leaf: Leaf, term: Term) -> None:
    if leaf.reason is not None:
        lock(term, leaf.reason)
    leaf.term = term


def unify(a: Term, b: Term, where: str) -> None:
    """Make two terms of one size the same; where they cannot be, lock both, with the operation as the reason."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if isinstance(a, Fixed) or isinstance(b, Fixed):
        lock(b if isinstance(a, Fixed) else a, f"combined with what are not channels by {where}")
    elif isinstance(a, Leaf) or isinstance(b, Leaf):
        leaf, other = (a, b) if isinstance(a, Leaf) else (b, a)
        if any(part is leaf for part in leaves(other)):
            lock(other, f"regrouped by {where}")
        else:
            bind(leaf, other)
    elif not _align(a, b, where):
        lock(a, f"regrouped by {where}")
        lock(b, f"regrouped by {where}")


def _align(a: Cat | Prod, b: Cat | Prod, where: str) -> bool:
    if isinstance(a, Prod) and isinstance(b, Prod):
        return _align_factors(list(a.factors), list(b.factors), where)
    x, y = list(a.parts if isinstance(a, Cat) else (a,)), list(b.parts if isinstance(b, Cat) else (b,))
    pairs = []
    while x and y:
        first, second = x.pop(0), y.pop(0)
        if first.size != second.size:
            longer, rest, size = (first, x, second.size) if first.size > second.size else (second, y, first.size)
            parts = split(longer, size)
            if parts is None:
                return False
            rest.insert(0, parts[1])
            first, second = (parts[0], second) if longer is first else (first, parts[0])
        pairs.append((first, second))
    for first, second in pairs:
        unify(first, second, where)
    return True


def _align_factors(x: list[Term], y: list[Term], where: str) -> bool:
    while x and y:
        first, second = x.pop(), y.pop()
        if first.size != second.size:
            longer, rest, size = (first, x, second.size) if first.size > second.size else (second, y, first.size)
            parts = factor(longer, size)
            if parts is None:
                return False
            rest.append(parts[0])
            first, second = (parts[1], second) if longer is first else (first, parts[1])
        unify(first, second, where)
    return True


def split(term: Term, size: int) -> tuple[Term, Term] | None:
    """Split a term into its first ``size`` entries and the others; None where that cuts through a product."""
    term = resolve(term)
    if size in (0, term.size):
        return (term, Fixed(0)) if size else (Fixed(0), term)
    if isinstance(term, Fixed):
        return Fixed(size), Fixed(term.size - size)
    if isinstance(term, Leaf):
        halves = Leaf(size), Leaf(term.size - size)
        bind(term, Cat(halves, term.size))
        return halves
    if isinstance(term, Cat):
        before: list[Term] = []
        for index, part in enumerate(term.parts):
            if part.size > size:
                parts = split(part, size)
                return parts and (cat([*before, parts[0]]), cat([parts[1], *term.parts[index + 1 :]]))
            before.append(part)
            size -= part.size
            if not size:
                return cat(before), cat(term.parts[index + 1 :])
    assert isinstance(term, Prod)
    outer, inner = term.factors[0], term.size // term.factors[0].size
    if size % inner:
        return None
    parts = split(outer, size // inner)
    return parts and (prod([parts[0], *term.factors[1:]]), prod([parts[1], *term.factors[1:]]))


def factor(term: Term, size: int) -> tuple[Term, Term] | None:
    """Write a term as a product whose inner factor has ``size`` entries; None where it is no such product."""
    term = resolve(term)
    if size in (1, term.size):
        return (term, Fixed(1)) if size == 1 else (Fixed(1), term)
    if term.size % size:
        return None
    if isinstance(term, Fixed):
        return Fixed(term.size // size), Fixed(size)
    if isinstance(term, Leaf):
        factors = Leaf(term.size // size), Leaf(size)
        bind(term, Prod(factors, term.size))
        return factors
    if isinstance(term, Prod):
        last, rest = term.factors[-1], term.factors[:-1]
        if last.size == size:
            return prod(rest), last
        if last.size > size:
            parts = factor(last, size)
            return parts and (prod([*rest, parts[0]]), parts[1])
        if size % last.size:
            return None
        parts = factor(prod(rest), size // last.size)
        return parts and (parts[0], prod([parts[1], last]))
    # Side by side, each a multiple of the inner factor, which they share.
    if any(part.size % size for part in term.parts):
        return _factor_whole(term, size)
    both = [factor(part, size) for part in term.parts]
    if None in both:
        return None
    for _, inner in both[1:]:
        unify(both[0][1], inner, "a reshape")
    return cat([outer for outer, _ in both]), both[0][1]


def _factor_whole(term: Cat, size: int) -> tuple[Term, Term] | None:
    """Factor a concatenation along boundaries between its parts, into blocks that are all made alike."""
    blocks, left = [], term
    for _ in range(term.size // size):
        parts = split(left, size)
        if parts is None:
            return None
        blocks.append(parts[0])
        left = parts[1]
    for block in blocks[1:]:
        unify(blocks[0], block, "a reshape")
    return Fixed(len(blocks)), blocks[0]


@dataclass(frozen=True)
class Span:
    """Where the channels of a leaf are along an axis: channel k has ``stride`` entries from offset + k·stride on, and
    again with each repeat (count, period), the outermost first."""

    leaf: Leaf
    offset: int
    stride: int
    repeats: tuple[tuple[int, int], ...]


def spans(term: Term, offset: int = 0, stride: int = 1, repeats: tuple[tuple[int, int], ...] = ()) -> Iterator[Span]:
    """Yield where the leaves of an axis are, in order of their first entries."""
    term = resolve(term)
    if isinstance(term, Leaf):
        yield Span(term, offset, stride, repeats)
    elif isinstance(term, Cat):
        for part in term.parts:
            yield from spans(part, offset, stride, repeats)
            offset += part.size * stride
    elif isinstance(term, Prod):
        inner = term.size * stride
        for part in term.factors:
            inner //= part.size
            yield from spans(part, offset, inner, repeats)
            repeats = (*repeats, (part.size, inner))
