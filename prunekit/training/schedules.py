"""Learning-rate schedules: pure functions of the progress of a training, as fvcore's ``param_scheduler``.

``progress`` is the share of finished steps, in [0, 1); the result is a factor in (0, 1] of the recipe's learning rate.
A resumed training therefore needs no state of its schedule. All raise ValueError for an argument out of range.
"""

from __future__ import annotations

import math

from prunekit.config import registry

SMALLEST = 1e-8  # some optimizers divide by the learning rate


@registry.register_schedule("constant")
def constant(progress: float) -> float:
    """Constant learning rate."""
    _check(progress)
    return 1.0


@registry.register_schedule("cosine")
def cosine(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Linear warmup, then half a cosine (SGDR without restarts, Loshchilov and Hutter, arXiv:1608.03983).

    Args:
        progress: share of the training, in [0, 1).
        warmup: share of the training for the warmup, in [0, 1).
        final: factor at the end, in [0, 1].
    """
    _check(progress, warmup=warmup)
    if not 0 <= final <= 1:
        raise ValueError(f"final={final} must be from 0 to 1")
    if progress < warmup:
        return _clamp(progress / warmup)
    return _clamp(_half_cosine(1.0, final, (progress - warmup) / (1 - warmup)))


@registry.register_schedule("step")
def step(progress: float, *, milestones: tuple[float, ...] = (2 / 3, 5 / 6), factor: float = 0.1) -> float:
    """Multiply by ``factor`` at each milestone.

    Args:
        progress: share of the training, in [0, 1).
        milestones: increasing shares of the training, each in (0, 1).
        factor: in (0, 1].
    """
    _check(progress)
    if any(low >= high for low, high in zip((0, *milestones), (*milestones, 1), strict=True)):
        raise ValueError(f"milestones={list(milestones)} must be increasing shares of the training between 0 and 1")
    if not 0 < factor <= 1:
        raise ValueError(f"factor={factor} must be above 0 and at most 1")
    return _clamp(factor ** sum(progress >= milestone for milestone in milestones))


@registry.register_schedule("one_cycle")
def one_cycle(progress: float, *, warmup: float = 0.3, start: float = 0.04, final: float = 1e-4) -> float:
    """Half a cosine up, half a cosine down (Super-Convergence, Smith and Topin, arXiv:1708.07120).

    Args:
        progress: share of the training, in [0, 1).
        warmup: share of the training up to the full learning rate, in [0, 1).
        start: factor at the beginning, in (0, 1].
        final: factor at the end, in (0, 1].
    """
    _check(progress, warmup=warmup)
    for name, value in (("start", start), ("final", final)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} must be above 0 and at most 1")
    if progress < warmup:
        return _clamp(_half_cosine(start, 1.0, progress / warmup))
    return _clamp(_half_cosine(1.0, final, (progress - warmup) / (1 - warmup)))


def _check(progress: float, warmup: float = 0.0) -> None:
    for name, value in (("progress", progress), ("warmup", warmup)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be a share of the training, from 0 to below 1")


def _half_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def _clamp(value: float) -> float:
    return min(max(value, SMALLEST), 1.0)  # rounding may exceed 1
