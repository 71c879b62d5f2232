"""Learning-rate schedules: pure functions of the progress of a training, after fvcore's ``param_scheduler``.

``progress`` is the share of the steps that is done, in [0, 1); the result is the factor in (0, 1] of the recipe's
learning rate. So a schedule knows nothing of epochs or steps, and a resumed run needs no state of it.
"""

from __future__ import annotations

import math

from prunekit.config import registry

# At zero a step would change nothing, and rules that divide by the learning rate would fail.
SMALLEST = 1e-8


@registry.register_schedule("constant")
def constant(progress: float) -> float:
    """The same learning rate throughout.

    Args:
        progress: share of the training that is done, in [0, 1).

    Raises:
        ValueError: ``progress`` is out of range.
    """
    _check(progress)
    return 1.0


@registry.register_schedule("cosine")
def cosine(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Up in a line, then down along half a cosine (Loshchilov and Hutter, SGDR, arXiv:1608.03983, without restarts).

    Args:
        progress: share of the training that is done, in [0, 1).
        warmup: share of the training for the way up, in [0, 1).
        final: factor at the end, in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    _check(progress, warmup=warmup)
    if not 0 <= final <= 1:
        raise ValueError(f"final is {final}; give a factor from 0 to 1")
    if progress < warmup:
        return _factor(progress / warmup)
    return _factor(_half_cosine(1.0, final, (progress - warmup) / (1 - warmup)))


@registry.register_schedule("step")
def step(progress: float, *, milestones: tuple[float, ...] = (2 / 3, 5 / 6), factor: float = 0.1) -> float:
    """Times ``factor`` at each milestone.

    Args:
        progress: share of the training that is done, in [0, 1).
        milestones: shares of the training, rising, each in (0, 1).
        factor: in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    _check(progress)
    if any(low >= high for low, high in zip((0, *milestones), (*milestones, 1), strict=True)):
        raise ValueError(f"milestones are {list(milestones)}; give rising shares of the training between 0 and 1")
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor}; give a number above 0 and at most 1")
    return _factor(factor ** sum(progress >= milestone for milestone in milestones))


@registry.register_schedule("one_cycle")
def one_cycle(progress: float, *, warmup: float = 0.3, start: float = 0.04, final: float = 1e-4) -> float:
    """Up and down along half a cosine each (Smith and Topin, Super-Convergence, arXiv:1708.07120).

    Args:
        progress: share of the training that is done, in [0, 1).
        warmup: share of the training for the way up, in [0, 1); the factor is 1 at its end.
        start: factor at the beginning, in (0, 1].
        final: factor at the end, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    _check(progress, warmup=warmup)
    for name, value in (("start", start), ("final", final)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; give a factor above 0 and at most 1")
    if progress < warmup:
        return _factor(_half_cosine(start, 1.0, progress / warmup))
    return _factor(_half_cosine(1.0, final, (progress - warmup) / (1 - warmup)))


def _check(progress: float, warmup: float = 0.0) -> None:
    for name, value in (("progress", progress), ("warmup", warmup)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; give a share of the training from 0 to below 1")


def _half_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def _factor(value: float) -> float:
    # Above 1 only by rounding.
    return min(max(value, SMALLEST), 1.0)
