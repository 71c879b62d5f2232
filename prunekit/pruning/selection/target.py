"""Sizes and latencies to reach."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from prunekit.errors import PlanError
from prunekit.pruning.selection.cost_model import Measure, ModelSize

TOLERANCE = 0.02  # largest accepted deviation of a slim model's size, relative to the budget
LATENCY_TOLERANCE = 0.05  # of its latency

SIZES = ("params", "macs", "params_ratio", "macs_ratio")
LATENCIES = ("latency_ms", "latency_ratio")
TARGETS = (*SIZES, *LATENCIES)


def target_measure(name: str) -> Measure:
    """What one of ``TARGETS`` limits."""
    return "latency_ms" if name in LATENCIES else "params" if name.startswith("params") else "macs"


def search_measure(names: Collection[str]) -> Measure:
    """By what the channels are chosen for some of ``TARGETS``: a latency, if one is given, else the size."""
    measures = [target_measure(name) for name in names]
    return "latency_ms" if "latency_ms" in measures else next(iter(measures), "macs")


@dataclass(frozen=True)
class Budget:
    """The size to reach: ``goal`` parameters, multiply-adds or milliseconds; ``limit`` is a second one to be met."""

    measure: Measure
    goal: float
    limit: Budget | None = None

    @classmethod
    def from_target(cls, dense: ModelSize, **target: float | None) -> Budget:
        """Return the budget given by one of ``SIZES``, one of ``LATENCIES``, or both; ratios refer to the size of the
        dense model.

        Raises:
            PlanError: none is given or two of a kind, one is not below the size of the dense model, or there is a
                latency and no table of latencies.
        """
        given = {name: value for name, value in target.items() if value is not None}
        sizes, latencies = ([name for name in names if name in given] for names in (SIZES, LATENCIES))
        if not given or len(sizes) > 1 or len(latencies) > 1:
            raise PlanError(
                "a budget is one of params, macs, params_ratio and macs_ratio, one of latency_ms and latency_ratio, or "
                "both; " + (f"{' and '.join(given)} are given" if given else "none is given")
            )
        budgets = [cls._of_one(dense, name, given[name]) for name in (*latencies, *sizes)]
        return replace(budgets[0], limit=budgets[1]) if len(budgets) > 1 else budgets[0]

    @classmethod
    def _of_one(cls, dense: ModelSize, name: str, value: float) -> Budget:
        measure = target_measure(name)
        dense_size, is_ratio = getattr(dense, measure), name.endswith("_ratio")
        if dense_size != dense_size:
            raise PlanError(
                f"{name}={value:g} needs a table of latencies; pass latencies=prunekit.profile(model, example)"
            )
        if is_ratio and not 0 < value < 1:
            raise PlanError(f"{name}={value:g}: must be above 0 and below 1, the size relative to the dense model")
        if not is_ratio and not 0 < value <= dense_size:
            raise PlanError(
                f"the budget of {amount(value, measure)} is not below the {number(dense_size, measure)} of the dense "
                "model"
            )
        goal = value * dense_size if is_ratio else value
        return cls(measure, goal if measure == "latency_ms" else round(goal) if is_ratio else int(goal))

    @property
    def tolerance(self) -> float:
        """The largest accepted deviation."""
        return LATENCY_TOLERANCE if self.measure == "latency_ms" else TOLERANCE

    def size(self, size: ModelSize) -> float:
        return getattr(size, self.measure)

    def at(self, share: float, dense: ModelSize) -> Budget:
        """The budget after a share, 0 to 1, of the way from the dense model's size, in equal ratios."""
        full = self.size(dense)
        goal = full * (self.goal / full) ** share
        limit = None if self.limit is None else self.limit.at(share, dense)
        return replace(self, goal=goal if self.measure == "latency_ms" else round(goal), limit=limit)

    def is_met(self, size: ModelSize) -> bool:
        return self.deviation(size) <= 0

    def deviation(self, size: ModelSize) -> float:
        """The relative deviation of a size from the goal; negative below it. Of two goals the larger deviation."""
        own = self.size(size) / self.goal - 1
        return own if self.limit is None else max(own, self.limit.deviation(size))

    def accepts(self, size: ModelSize) -> bool:
        """Whether what was chosen for this budget, and is zero already, is of that size.

        A latency may be lower: it was measured, where this one is predicted, and what is zero costs nothing to remove.
        """
        if self.measure == "latency_ms":
            own = replace(self, limit=None).deviation(size)
            return own <= 3 * LATENCY_TOLERANCE and (self.limit is None or self.limit.is_met(size))
        return -TOLERANCE <= self.deviation(size) <= 0

    def describe(self, size: ModelSize) -> str:
        """The part of a size that this budget limits."""
        return amount(self.size(size), self.measure)

    def describe_deviation(self, size: ModelSize) -> str:
        if self.limit is not None and self.limit.deviation(size) == self.deviation(size):
            return self.limit.describe_deviation(size)
        deviation = self.deviation(size)
        side = "below" if deviation < 0 else "above"
        return f"{self.describe(size)}, {abs(deviation):.1%} {side} the budget of {number(self.goal, self.measure)}"

    def __str__(self) -> str:
        return amount(self.goal, self.measure) + (f" and {self.limit}" if self.limit else "")


def amount(value: float, measure: Measure) -> str:
    """A size with its unit."""
    return f"{number(value, measure)} {'ms' if measure == 'latency_ms' else measure}"


def number(value: float, measure: Measure) -> str:
    return f"{value:.3g}" if measure == "latency_ms" else f"{value:,}"
