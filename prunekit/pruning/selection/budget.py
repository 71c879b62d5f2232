"""Plans that fit a budget of parameters or multiply-adds.

The channels go in the order of their scores, and where the order ends is searched for: ``Sizes`` says what is left
without building it. Afterwards a slim model may still be larger or smaller than its plan (carriers of constants, biases
of folded ones, channels given back); so the real one is counted, and the search is done again with what it was off by.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from prunekit.errors import PlanError, PrunekitWarning
from prunekit.flops import count_modules, total
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.cost_model import ModelSize, SizeModel
from prunekit.pruning.selection.extract import plan_of_choice
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.selection.layers import Layer
from prunekit.pruning.selection.selector import Scope, Scores, Selection, Selector
from prunekit.pruning.surgery.equivalence import EquivalenceReport
from prunekit.pruning.surgery.slim import slim

TOLERANCE = 0.02  # of the budget: how far from it a slim model may be
ATTEMPTS = 5  # to make up for what slimming adds

Measure = Literal["params", "macs"]


@dataclass(frozen=True)
class Budget:
    """How large a slim model is to be: ``goal`` parameters or multiply-adds."""

    measure: Measure
    goal: int

    @classmethod
    def of(cls, dense: ModelSize, **given: float | None) -> Budget:
        """The budget that is given by one of ``params``, ``macs``, ``params_ratio`` and ``macs_ratio``.

        Args:
            dense: the size of the dense model, which ratios are relative to.

        Raises:
            PlanError: not exactly one of the four is given, or it is no size below the dense model's.
        """
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise PlanError(
                "a budget is one of params, macs, params_ratio and macs_ratio; "
                + (f"{' and '.join(named)} are given" if named else "none is given")
            )
        ((name, value),) = named.items()
        measure: Measure = "params" if name.startswith("params") else "macs"
        full = getattr(dense, measure)
        if name.endswith("_ratio") and not 0 < value < 1:
            raise PlanError(f"the budget {name} is a share of the dense model, above 0 and below 1, got {value:g}")
        if not 0 < value <= full:
            raise PlanError(f"the budget of {value:,} {measure} is not below the {full:,} of the dense model")
        return cls(measure, round(value * full) if name.endswith("_ratio") else int(value))

    def met(self, size: ModelSize) -> bool:
        return self.read(size) <= self.goal

    def read(self, size: ModelSize) -> int:
        """The size in this budget's measure."""
        return getattr(size, self.measure)

    def off(self, number: int) -> float:
        """How far a number is from the goal, as a share of it; below 0 where it is smaller."""
        return number / self.goal - 1

    def told(self, number: int) -> str:
        """How far a number is from the goal, in words."""
        return f"{abs(self.off(number)):.1%} {'below' if number < self.goal else 'above'} the budget of {self.goal:,}"

    def __str__(self) -> str:
        return f"{self.goal:,} {self.measure}"


class BudgetSearch:
    """Finds plans of given sizes for one model.

    Args:
        model: the dense model.
        groups: of that model.
        shape: of one input without the batch, (C, H, W) or (C,).
        scores: for each group its channels' scores, as a criterion gives them; by default the effective gates.
        limits: ``scope``, ``min_channels``, ``round_to`` and ``ignored_layers``, as for ``extract``.

    Attributes:
        sizes: what is left without some channels.
        smallest: the smallest size that the limits allow.

    Raises:
        PlanError: scores or limits that cannot be used.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], shape: Sequence[int], scores: Scores | None, **limits: Any
    ):
        self.model, self.groups, self.shape = model, list(groups), tuple(shape)
        if scores is None:
            scores = gate(model, groups)
        self.chooser = Selector(model, groups, scores, **limits)
        self.sizes = SizeModel(model, groups, shape)
        if self.chooser.scope == "layer":
            widths = np.unique(self.chooser.widths)
            self._steps = np.unique(np.concatenate([np.arange(w + 1) / w for w in widths] or [np.zeros(1)])).tolist()
        else:
            self._steps = list(range(self.chooser.most + 1))
        self.smallest = self.sizes.of(self._cut(len(self._steps) - 1).dead)

    def budget(self, **given: float | None) -> Budget:
        """The budget of ``params``, ``macs``, ``params_ratio`` or ``macs_ratio``, where it can be met.

        Raises:
            PlanError: it cannot; the message says what can.
        """
        budget = Budget.of(self.sizes.dense, **given)
        least = budget.read(self.smallest)
        if least > budget.goal:
            limits = " with these min_channels, round_to and ignored_layers" if self._limited() else ""
            raise PlanError(
                f"the budget of {budget} cannot be met: between {least:,} and {budget.read(self.sizes.dense):,} "
                f"{budget.measure} can be had{limits}"
            )
        return budget

    def choose(self, budget: Budget) -> Selection:
        """The channels to cut for a budget: as many as it takes in the order of their scores, to be at or below it."""
        choice = self._search(budget)
        now = budget.read(self.sizes.of(choice.dead))
        if abs(budget.off(now)) > TOLERANCE:
            choice.say(
                f"the plan has {now:,} {budget.measure}, {budget.told(now)}: no channel is so small that it fits"
            )
        return choice

    def _search(self, budget: Budget) -> Selection:
        low, high = 0, len(self._steps) - 1
        while low < high:
            middle = (low + high) // 2
            met = budget.met(self.sizes.of(self._cut(middle).dead))
            low, high = (low, middle) if met else (middle + 1, high)
        choice = self._cut(low)
        # How many channels it takes is nobody's wish.
        for notes in (choice.notes, choice.urgent):
            notes[:] = [note for note in notes if note != choice.fewer]
        if budget.off(budget.read(self.sizes.of(choice.dead))) < -TOLERANCE:
            # One step less, and it would be too large: a branch comes back whole, say. Smaller ones may still fit.
            self._give_back(budget, choice)
        return choice

    def slim(
        self, budget: Budget, example: Tensor, constants: str = "carrier"
    ) -> tuple[nn.Module, EquivalenceReport, list[str]]:
        """A slim model that meets a budget, everything counted that slimming adds to the plan: within 2% of it, below
        where one is found.

        Args:
            example: a batch of data, (N, C, H, W); the equivalence check runs on it.
            constants: as for ``prunekit.slim``.

        Returns:
            the model, the equivalence check, and those of its plan's notes that tell of something else than was asked for.

        Raises:
            PlanError: the equivalence check fails.
        """
        aim, seen = budget.goal, set()
        best: tuple[tuple[bool, bool, float], int, nn.Module, EquivalenceReport, list[str]] | None = None
        for _ in range(ATTEMPTS):
            aim = min(max(aim, budget.read(self.smallest)), budget.read(self.sizes.dense))
            choice = self._search(Budget(budget.measure, aim))
            dead = frozenset((name, channel) for name, channels in choice.dead.items() for channel in channels)
            if dead in seen:
                # A channel is more than it was off by.
                aim -= round(TOLERANCE / 2 * budget.goal)
                continue
            seen.add(dead)
            plan = plan_of_choice(self.model, self.groups, choice)
            model, equivalence = slim(self.model, plan, example, groups=self.groups, constants=constants)
            counts, _ = count_modules(model, self.shape)
            now = total(counts)[budget.measure]
            off = budget.off(now)
            # Near enough first, then rather below than above: a budget is a limit where it can be one.
            rank = abs(off) > TOLERANCE, off > 0, abs(off)
            if best is None or rank < best[0]:
                best = rank, now, model, equivalence, choice.urgent
            if -TOLERANCE <= off <= 0:
                break
            aim -= now - budget.goal
        _, now, model, equivalence, urgent = best
        if abs(budget.off(now)) > TOLERANCE:
            said = f"the slim model has {now:,} {budget.measure}, {budget.told(now)}: no plan is nearer"
            equivalence.plan.notes.append(said)
            urgent = [*urgent, said]
        return model, equivalence, urgent

    def _cut(self, step: int) -> Selection:
        value = self._steps[step]
        return self.chooser.cut(share=value) if self.chooser.scope == "layer" else self.chooser.cut(count=value)

    def _limited(self) -> bool:
        chooser = self.chooser
        return chooser.min_channels > 1 or chooser.round_to > 1 or bool(chooser.fixed.any())

    def _give_back(self, budget: Budget, choice: Selection) -> None:
        """Give channels back, the best first, as far as the budget allows; in place."""
        chooser = self.chooser
        waiting = sorted(
            (
                (chooser.values[place][channel], -place, channel)
                for place, group in enumerate(chooser.groups)
                for channel in choice.dead[group.id]
                if len(choice.dead[group.id]) < group.channels and not chooser.preset[place]
            ),
            reverse=True,
        )
        for _, place, _ in waiting:
            group, order, step = chooser.groups[-place], chooser.order[-place], int(chooser.step[-place])
            dead = len(choice.dead[group.id])
            kept = group.channels - dead
            # The best dead ones of the group, as many as make the next count that may be kept.
            more = min((kept // step + 1) * step, group.channels) - kept
            tried = {**choice.dead, group.id: set(order[: max(dead - more, 0)].tolist())}
            if dead and budget.met(self.sizes.of(tried)):
                choice.dead = tried
        choice.cut = sum(map(len, choice.dead.values()))


def fit_budget(
    model: nn.Module,
    groups: Sequence[Group],
    example: Tensor,
    *,
    params: int | None = None,
    macs: int | None = None,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    scores: Scores | None = None,
    scope: Scope = "global",
    min_channels: int = 1,
    round_to: int = 1,
    ignored_layers: Sequence[Layer] = (),
) -> Plan:
    """The plan whose slim model fits a budget: at or just below it.

    What slimming adds to a plan (a carrier of constants here and there) is not counted; ``slim_to_budget`` does.

    Args:
        model: the dense model.
        groups: of that model.
        example: a batch of inputs; multiply-adds are counted at its size, for one input.
        params, macs: the budget, one of them in absolute numbers …
        params_ratio, macs_ratio: … or as a share of the dense model.
        scores, scope, min_channels, round_to, ignored_layers: as for ``extract``.

    Raises:
        PlanError: the budget cannot be met (the message says what can), or an argument cannot be used.
    """
    fitter = BudgetSearch(
        model, groups, example.shape[1:], scores,
        scope=scope, min_channels=min_channels, round_to=round_to, ignored_layers=ignored_layers,
    )  # fmt: skip
    budget = fitter.budget(params=params, macs=macs, params_ratio=params_ratio, macs_ratio=macs_ratio)
    choice = fitter.choose(budget)
    for note in choice.urgent:
        warnings.warn(note, PrunekitWarning, stacklevel=2)
    return plan_of_choice(model, groups, choice)


def slim_to_budget(
    model: nn.Module,
    example: Tensor,
    *,
    groups: Sequence[Group] | None = None,
    params: int | None = None,
    macs: int | None = None,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    scores: Scores | None = None,
    scope: Scope = "global",
    min_channels: int = 1,
    round_to: int = 1,
    ignored_layers: Sequence[Layer] = (),
    constants: str = "carrier",
) -> tuple[nn.Module, EquivalenceReport]:
    """The slim model that fits a budget within 2%, and its equivalence check: groups, plan and slimming in one call.

    Args and errors as for ``fit_budget`` and ``slim``; ``equivalence.plan.notes`` says what is not as it was asked for.
    """
    groups = find_groups(model, example) if groups is None else groups
    fitter = BudgetSearch(
        model, groups, example.shape[1:], scores,
        scope=scope, min_channels=min_channels, round_to=round_to, ignored_layers=ignored_layers,
    )  # fmt: skip
    budget = fitter.budget(params=params, macs=macs, params_ratio=params_ratio, macs_ratio=macs_ratio)
    small, equivalence, urgent = fitter.slim(budget, example, constants)
    for note in urgent:
        warnings.warn(note, PrunekitWarning, stacklevel=2)
    return small, equivalence
