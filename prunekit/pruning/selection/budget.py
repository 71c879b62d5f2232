"""Plans and slim models of a given size.

Channels are pruned in the order of their scores, and a binary search finds how many: :class:`SizeModel` predicts the
size without building the model. A slim model can differ in size from its plan (by added biases and, with ``exact``, by
channels that are kept), so it is counted, and the search is repeated with the difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import numpy as np
from torch import nn

from prunekit.errors import PlanError, PrunekitWarning
from prunekit.flops import count_modules, total
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.cost_model import Measure, ModelSize, SizeModel
from prunekit.pruning.selection.explain import OTHER_IMPORTANCE, describe_unprunable, describe_unscored
from prunekit.pruning.selection.extract import plan_from_selection
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.selection.latency_model import LatencyTable
from prunekit.pruning.selection.latency_path import removal_path
from prunekit.pruning.selection.layer_matching import Layer
from prunekit.pruning.selection.selector import Scope, Scores, Selection, Selector
from prunekit.pruning.selection.target import TARGETS, Budget, amount, number, search_measure
from prunekit.pruning.surgery.equivalence import EquivalenceReport, check_sizes
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.slim import slim
from prunekit.utils.compiled import unwrap
from prunekit.utils.inputs import Example, as_example

MAX_ATTEMPTS = 5  # at compensating for what slimming adds


class BudgetSearch:
    """Finds selections and slim models of given sizes for one model.

    Args:
        example: the shape of one input without the batch, such as (C, H, W), or a batch of inputs.
        scores: for each group its channels' scores; by default the effective gates.
        cost_power: divides each score by this power of the channel's share of ``measure``.
        latencies: measured ones, for a budget of time.
        limits: keyword arguments of :class:`Selector`.

    Attributes:
        smallest: the smallest size that the limits allow.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        example: Sequence[int] | Example,
        scores: Scores | None,
        *,
        cost_power: float = 0.0,
        measure: Measure = "macs",
        latencies: LatencyTable | None = None,
        **limits: Any,
    ):
        self.model, self.groups, self.example = unwrap(model), list(groups), example
        self.size_model = SizeModel(self.model, groups, example, latencies)
        scores = gate(model, groups) if scores is None else scores
        if measure == "latency_ms" and (cost_power or limits.get("scope", "global") != "global"):
            raise PlanError("channels are ranked by what they save of a latency; drop cost_power and scope")
        if cost_power:
            scores = self.size_model.per_cost(scores, measure, cost_power)
        self.selector = Selector(self.model, groups, scores, **limits)
        if cost_power and self.selector.scope == "layer":
            raise PlanError(
                "cost_power compares layers, and with scope 'layer' (global_pruning=False) all lose the same share; "
                "drop one of the two"
            )
        # The values between which the search decides: ratios at which the count of some layer changes, or counts.
        self._values: list[Any]
        self._by_latency = measure == "latency_ms"
        if self._by_latency:
            self._values = removal_path(self.selector, self.size_model)
        elif self.selector.scope == "layer":
            widths = np.unique(self.selector.widths)
            self._values = np.unique(np.concatenate([np.arange(w + 1) / w for w in widths] or [np.zeros(1)])).tolist()
        else:
            self._values = list(range(self.selector.max_count + 1))
        self.smallest = self.size_model.size_without(self._select(len(self._values) - 1).dead)

    def budget(self, **target: float | None) -> Budget:
        """Return the budget given by one of ``TARGETS``; raise PlanError, which says what can be met, if it cannot."""
        budget = Budget.from_target(self.size_model.dense, **target)
        selector = self.selector
        if not selector.groups:
            raise PlanError(f"the budget of {budget} cannot be met: {describe_unprunable(self.groups)}")
        if selector.unscored.all():
            raise PlanError(f"the budget of {budget} cannot be met: {describe_unscored(selector)}; {OTHER_IMPORTANCE}")
        for part in (budget, budget.limit):
            if part is None or part.size(self.smallest) <= part.goal:
                continue
            least, most = part.size(self.smallest), part.size(self.size_model.dense)
            limited = selector.min_channels > 1 or selector.round_to > 1 or selector.ignored.any()
            raise PlanError(
                f"the budget of {part} cannot be met; choose one between {number(least, part.measure)} and "
                f"{amount(most, part.measure)}"
                + (", or relax min_channels, round_to and ignored_layers" if limited else "")
                + (f"; {describe_unscored(selector)}: {OTHER_IMPORTANCE}" if selector.unscored.any() else "")
            )
        return budget

    def select(self, budget: Budget) -> Selection:
        """Select as many channels, lowest scores first, as it takes to be at or below the budget."""
        selection = self._search(budget)
        size = self.size_model.size_without(selection.dead)
        if abs(budget.deviation(size)) > budget.tolerance:
            selection.add_note(f"the plan has {budget.describe_deviation(size)}: no single channel fits in between")
        return selection

    def slim(
        self,
        budget: Budget,
        example: Example,
        exact: bool = False,
        sizes: Sequence[tuple[int, ...]] | None = None,
        thorough: bool = True,
    ) -> tuple[nn.Module, EquivalenceReport, list[str]]:
        """Build a slim model that meets the budget within 2%, and is at or below it where possible.

        Args:
            budget: the size of the slim model.
            example, exact, sizes, thorough: as for ``prunekit.slim``.

        Returns:
            the model, its equivalence check (see ``prunekit.slim``), and the notes that the user should see.
        """
        goal, seen = budget.goal, set()
        best: tuple[tuple[bool, bool, float], ModelSize, nn.Module, EquivalenceReport, list[str]] | None = None
        sizes = check_sizes(self.model, example, thorough) if sizes is None else sizes
        for _ in range(MAX_ATTEMPTS):
            goal = min(max(goal, budget.size(self.smallest)), budget.size(self.size_model.dense))
            selection = self._search(replace(budget, goal=goal))
            dead = frozenset((name, channel) for name, channels in selection.dead.items() for channel in channels)
            if dead in seen:
                # One channel is larger than the remaining deviation.
                goal -= budget.tolerance / 2 * budget.goal
                continue
            seen.add(dead)
            plan = plan_from_selection(self.model, self.groups, selection)
            model, equivalence = slim(self.model, plan, example, groups=self.groups, exact=exact, sizes=sizes)
            assert equivalence.plan is not None
            size = self.size_of(model, equivalence.plan)
            deviation = budget.deviation(size)
            # Within the tolerance first, then below rather than above.
            rank = abs(deviation) > budget.tolerance, deviation > 0, abs(deviation)
            if best is None or rank < best[0]:
                best = rank, size, model, equivalence, selection.warnings
            if -budget.tolerance <= deviation <= 0:
                break
            goal -= deviation * budget.goal
        assert best is not None
        _, size, model, equivalence, notes = best
        if abs(budget.deviation(size)) > budget.tolerance:
            note = f"the slim model has {budget.describe_deviation(size)}: no plan is closer"
            assert equivalence.plan is not None
            equivalence.plan.notes.append(note)
            notes = [*notes, note]
        return model, equivalence, notes

    def are_zero(self, selection: Selection) -> bool:
        """Whether all selected channels have a score of zero, as after gradual pruning."""
        scores = zip(self.selector.groups, self.selector.scores, strict=True)
        return all(not np.any(own[list(selection.dead[group.id])] > 0) for group, own in scores)

    def size_of(self, model: nn.Module, plan: Plan) -> ModelSize:
        """The size of the slim model of a plan: its parameters and multiply-adds counted, its latency predicted."""
        counted = total(count_modules(model, self.example)[0])
        predicted = self.size_model.size_without(dead_channels(self.groups, plan))
        return ModelSize(counted["params"], counted["macs"], predicted.latency_ms)

    def _search(self, budget: Budget) -> Selection:
        # After gradual pruning exactly these are to be pruned. Fewer may meet the budget, but the others emit nothing.
        zeros = self.selector.select(threshold=0.0, searched=True)
        if budget.accepts(self.size_model.size_without(zeros.dead)):
            return zeros
        low, high = 0, len(self._values) - 1
        while low < high:
            middle = (low + high) // 2
            met = budget.is_met(self.size_model.size_without(self._select(middle).dead))
            low, high = (low, middle) if met else (middle + 1, high)
        selection = self._select(low)
        if budget.deviation(self.size_model.size_without(selection.dead)) < -budget.tolerance:
            # The last step is large, such as a whole branch of a layer. Smaller ones may fit as well.
            if self._by_latency:
                return self._undo_steps(budget, low)
            self._restore_channels(budget, selection)
        return selection

    def _select(self, index: int) -> Selection:
        if self._by_latency:
            return self.selector.select_counts(self._values[index])
        if self.selector.scope == "layer":
            return self.selector.select(pruning_ratio=self._values[index], searched=True)
        return self.selector.select(count=self._values[index], searched=True)

    def _undo_steps(self, budget: Budget, index: int) -> Selection:
        """Undo single steps of the path, the last ones first, as far as the budget allows."""
        selection, counts = self._select(index), self._values[index].copy()
        for before, after in zip(self._values[index - 1 :: -1], self._values[index:0:-1], strict=True):
            undone = np.where((before != after) & (counts == after), before, counts)
            tried = self.selector.select_counts(undone)
            if budget.is_met(self.size_model.size_without(tried.dead)):
                selection, counts = tried, undone
        return selection

    def _restore_channels(self, budget: Budget, selection: Selection) -> None:
        """Restore channels, highest scores first, as far as the budget allows; in place."""
        selector = self.selector
        restorable = [
            (-selector.scores[index][channel], index, -channel)
            for index, group in enumerate(selector.groups)
            for channel in selection.dead[group.id]
            if len(selection.dead[group.id]) < group.channels and not selector.preset[index]
        ]
        for _, index, _ in sorted(restorable):
            group, multiple = selector.groups[index], int(selector.multiples[index])
            dead = len(selection.dead[group.id])
            kept = group.channels - dead
            # As many as make the next number that may be kept.
            more = min((kept // multiple + 1) * multiple, group.channels) - kept
            tried = {**selection.dead, group.id: set(selector.prune_order[index][: max(dead - more, 0)].tolist())}
            if dead and budget.is_met(self.size_model.size_without(tried)):
                selection.dead = tried
        selection.pruned = sum(map(len, selection.dead.values()))


class BudgetOptions(TypedDict, total=False):
    """A budget, given by one or two of the first six, and how to reach it."""

    params: int | None
    macs: int | None
    params_ratio: float | None
    macs_ratio: float | None
    latency_ms: float | None
    latency_ratio: float | None
    latencies: LatencyTable | None
    scores: Scores | None
    cost_power: float
    scope: Scope
    min_channels: int
    round_to: int
    ignored_layers: Sequence[Layer]


def _search(
    model: nn.Module, groups: Sequence[Group], example: Example, scores: Scores | None = None, **options: Any
) -> tuple[BudgetSearch, Budget]:
    target = {name: options.pop(name, None) for name in TARGETS}
    measure = search_measure([name for name, value in target.items() if value is not None])
    search = BudgetSearch(model, groups, example, scores, **{"measure": measure, **options})
    return search, search.budget(**target)


def fit_budget(model: nn.Module, groups: Sequence[Group], example: Example, **options: Unpack[BudgetOptions]) -> Plan:
    """Return the plan whose slim model is at or just below a budget.

    What slimming adds to a plan (biases, and channels with ``exact``) is not counted; ``slim_to_budget`` counts it.

    Args:
        model: the dense model.
        groups: its groups.
        example: a batch of inputs as for ``find_groups``; multiply-adds are counted for one of them.
        params, macs: the budget as a number of parameters or multiply-adds …
        params_ratio, macs_ratio: … or relative to the dense model.
        cost_power: prefers channels that cost much: divides each score by this power of the share of the parameters or
            multiply-adds (whichever the budget limits) that goes with the channel.
        scores, scope, min_channels, round_to, ignored_layers: as for ``extract``.

    Raises:
        PlanError: the budget cannot be met (the message says what can), or an argument cannot be used.
    """
    search, budget = _search(model, groups, as_example(example), **options)
    selection = search.select(budget)
    for note in selection.warnings:
        warnings.warn(note, PrunekitWarning, stacklevel=2)
    return plan_from_selection(search.model, groups, selection)


def slim_to_budget(
    model: nn.Module,
    example: Example,
    *,
    groups: Sequence[Group] | None = None,
    exact: bool = False,
    **options: Unpack[BudgetOptions],
) -> tuple[nn.Module, EquivalenceReport]:
    """Return the slim model that meets a budget within 2%, and its equivalence check.

    Args and errors as for ``fit_budget`` and ``slim``. ``equivalence.plan.notes`` says where the result differs from
    the request.
    """
    example = as_example(example)
    groups = find_groups(model, example) if groups is None else groups
    search, budget = _search(model, groups, example, **options)
    slim_model, equivalence, notes = search.slim(budget, example, exact)
    for note in notes:
        warnings.warn(note, PrunekitWarning, stacklevel=2)
    return slim_model, equivalence
