"""Prune any model in a few lines, with your own training loop around it."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.errors import PlanError, PrunekitWarning
from prunekit.flops import ModelCost, count
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.budget import BudgetSearch
from prunekit.pruning.selection.extract import plan_from_selection
from prunekit.pruning.selection.importance import check_finite
from prunekit.pruning.selection.latency_model import LatencyTable
from prunekit.pruning.selection.layer_matching import Layer, match_layers
from prunekit.pruning.selection.selector import Scope, Scores, Selection, Selector, check_limits
from prunekit.pruning.selection.target import TARGETS, search_measure
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.pruning.surgery.compose import match_groups
from prunekit.pruning.surgery.equivalence import EquivalenceReport
from prunekit.pruning.surgery.slim import slim
from prunekit.utils.compiled import unwrap
from prunekit.utils.copying import copy_module
from prunekit.utils.inputs import Example, as_example
from prunekit.utils.text import suggest

Importance = str | Callable[[nn.Module, Sequence[Group]], Scores]
Loss = Callable[[nn.Module], Iterable[Tensor] | Tensor]


@dataclass(frozen=True)
class PruningReport:
    """What one step of a :class:`Pruner` did."""

    step: int  # its number, from 1
    steps: int  # how many steps the pruner takes
    before: ModelCost
    after: ModelCost
    layers: dict[str, tuple[int, int]]  # output channels of each convolution and linear layer after and before the step
    equivalence: EquivalenceReport
    notes: list[str]  # what was done differently from the request, one sentence each

    @property
    def plan(self) -> Plan:
        assert self.equivalence.plan is not None
        return self.equivalence.plan

    def __str__(self) -> str:
        check = self.equivalence
        lines = [
            f"step {self.step}/{self.steps}",
            f"  params  {_change(self.before.params, self.after.params)}",
            f"  MACs    {_change(self.before.macs, self.after.macs)}",
            f"  equivalence check passed: largest difference {check.max_abs_diff:.1e}",
            f"  {check.describe_drift()}",
        ]
        if changed := {name: sizes for name, sizes in self.layers.items() if sizes[0] != sizes[1]}:
            width = max(map(len, changed))
            lines.append(f"  output channels kept in {len(changed)} of {len(self.layers)} layers pruned:")
            lines += [f"    {name:{width}}  {after}/{before}" for name, (after, before) in changed.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    __repr__ = __str__


class Pruner:
    """Prunes a model to a share of its channels or to a target size.

    ``step()`` returns a smaller, ordinary ``nn.Module``; the model given is never changed. With ``steps`` above 1,
    train what ``step()`` returned before you call it again.

    Args:
        model: any model.
        example_inputs: a batch of real data: a tensor, such as images, (N, C, H, W), or tokens, (N, L); a tuple of the
            model's arguments; or a dict of its keyword arguments. Shapes, MACs and the equivalence check need it.
        importance: scores the channels, and the lowest are pruned: ``"gate"`` (BatchNorm weights), ``"magnitude"``,
            ``"taylor"`` and ``"ablation"`` (which need ``loss``), ``"random"``, a name registered with
            ``register_importance``, or a function of the model and its groups that returns an array of scores for each
            ``group.id``.
        pruning_ratio: share of the channels to prune, from 0 to 1.
        target: size to reach instead of a ratio, within 2%: ``{"macs_ratio": 0.5}`` keeps half of the multiply-adds;
            or ``params_ratio``, ``macs`` or ``params``; with ``latencies`` also ``latency_ratio`` or ``latency_ms``,
            beside one of the others or alone.
        latencies: from :func:`prunekit.profile`, for a latency on the machine that measured them.
        ignored_layers: layers whose output channels are all kept: modules, or patterns of names such as ``"stem*"``.
        cost_power: with a target, divides the score of a channel by this power of its share of the parameters or
            multiply-adds that the target limits; 1 ranks by importance per multiply-add.
        per_layer_ratio: for some layers (modules or patterns) the share of their own channels to prune;
            ``ignored_layers`` takes precedence.
        global_pruning: whether channels compete across all layers, or each layer loses the same share. The heads of an
            attention only compete; with the same share for all they stay, and each loses channels.
        isomorphic: with ``global_pruning``, whether only layers of the same structure compete, so that each kind of
            layer loses the same share (Fang et al., ECCV 2024).
        round_to: kept channels of each layer are rounded up to a multiple of this.
        min_channels: number of channels to keep in each layer.
        steps: number of calls of ``step()`` in which to reach the ratio or target.
        loss: for ``"taylor"`` and ``"ablation"``: a function of the model that yields its loss on a few batches, or
            returns one loss.
        exact: see :func:`prunekit.slim`.
        thorough: whether the equivalence check runs at all input sizes at which the model does something of its own,
            such as a padding of odd maps; else at two of them. Always so with ``exact``.

    Attributes:
        model: the current model: the one to prune next. Assign to it to continue from a trained copy.
        current_step: number of steps done.

    Raises:
        PlanError: an argument cannot be used, or the target cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Example,
        *,
        importance: Importance = "gate",
        pruning_ratio: float | None = None,
        target: Mapping[str, float] | None = None,
        latencies: LatencyTable | None = None,
        cost_power: float = 0.0,
        ignored_layers: Sequence[Layer] = (),
        per_layer_ratio: Mapping[Layer, float] | None = None,
        global_pruning: bool = True,
        isomorphic: bool = False,
        round_to: int = 1,
        min_channels: int = 1,
        steps: int = 1,
        loss: Loss | None = None,
        exact: bool = False,
        thorough: bool = True,
    ):
        _check_arguments(model, pruning_ratio, target, per_layer_ratio, steps)
        example_inputs = as_example(example_inputs)
        if isomorphic and not global_pruning:
            raise PlanError(
                "isomorphic=True ranks across layers, and global_pruning=False does not; drop one of the two"
            )
        if cost_power and not target:
            raise PlanError('cost_power needs a target, such as target={"macs_ratio": 0.5}')
        self.example_inputs, self.steps, self.current_step = example_inputs, steps, 0
        self._model = model = unwrap(model)
        self._importance = _importance_function(importance, loss)
        self._ratio, self._target = pruning_ratio or 0.0, dict(target or {})
        self._latencies, self._thorough = latencies, thorough or exact
        self._global, self._exact, self._cost_power = global_pruning, exact, cost_power
        self._scope: Scope = "isomorphic" if isomorphic else "global"
        self._limits: dict[str, Any] = {"min_channels": min_channels, "round_to": round_to}
        self._found = find_groups(model, example_inputs)
        # A slim model, the groups of the model before, and the plan between them.
        self._unfound: tuple[nn.Module, list[Group], Plan] | None = None
        self._ignored = match_layers(model, self._groups, ignored_layers, "ignored_layers")
        self._ratios = _ratios_by_group(model, self._groups, per_layer_ratio or {})
        # The number of channels of each group before the first step.
        self._widths = {group.id: group.channels for group in self._groups}
        if not self._target:
            check_limits(**self._limits)
            check_finite(model)
        else:
            ranked = [g for g in self._groups if g.reason is None and (importance != "gate" or g.gates)]
            search = self._search({g.id: np.zeros(g.channels) for g in ranked}, 1.0)
            self._dense_size = search.size_model.dense
            self._budget = search.budget(**self._target)

    @property
    def model(self) -> nn.Module:
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        model = unwrap(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in self._model.named_parameters()}:
            raise PlanError("pruner.model must have the layers that step() returned; assign a trained copy of it")
        self._model = model

    def step(self) -> tuple[nn.Module, PruningReport]:
        """Prune the current model towards the ratio or target.

        Returns:
            the slim model, which is the next ``pruner.model``, and a report.

        Raises:
            PlanError: all steps are done, the target cannot be met, or the slim model fails its equivalence check.
        """
        if self.current_step >= self.steps:
            raise PlanError(f"all {self.steps} steps of this Pruner are done; make a new one to prune further")
        step, before = self.current_step + 1, self._model
        scores = _as_arrays(self._importance(before, self._groups))
        prune = self._slim_to_target if self._target else self._slim_to_ratio
        slim_model, check, notes = prune(scores, step / self.steps)
        assert check.plan is not None
        for note in notes:
            warnings.warn(note, PrunekitWarning, stacklevel=2)
        costs = count(before, self.example_inputs), count(slim_model, self.example_inputs)
        layers = _layer_widths(before, slim_model)
        report = PruningReport(step, self.steps, *costs, layers, check, list(check.plan.notes))
        self._advance(slim_model, check.plan)
        return slim_model, report

    def gradual(
        self, total_steps: int, *, start: float = 0.0, end: float = 0.5, power: float = 2.0, rounds: int = 1
    ) -> GradualPruning:
        """Shrink to zero what ``step()`` will prune, while you train ``pruner.model``; then ``step()`` changes nothing.

        Args:
            total_steps, start, end, power, rounds: see :class:`GradualPruning`. Call its ``step()`` after each step of
                the optimizer.

        Raises:
            PlanError: an argument is out of range, or the pruner takes several steps.
        """
        if self.steps > 1:
            raise PlanError(f"gradual() needs a Pruner with steps=1, not {self.steps}; use its rounds instead")

        def choose(model: nn.Module, share: float) -> dict[str, set[int]]:
            # On a copy: an importance may run the model, in eval mode.
            scores = _as_arrays(self._importance(copy_module(model).eval(), self._groups))
            if self._target:
                return self._search(scores, share).select(self._budget.at(share, self._dense_size)).dead
            return self._select_ratio(scores, share).dead

        return GradualPruning(
            self._model, self._groups, choose, total_steps, start=start, end=end, power=power, rounds=rounds
        )

    def _slim_to_ratio(self, scores: Scores, share: float) -> tuple[nn.Module, EquivalenceReport, list[str]]:
        selection = self._select_ratio(scores, share)
        plan = plan_from_selection(self._model, self._groups, selection)
        options: dict[str, Any] = {"exact": self._exact, "thorough": self._thorough}
        slim_model, check = slim(self._model, plan, self.example_inputs, groups=self._groups, **options)
        return slim_model, check, selection.warnings

    def _slim_to_target(self, scores: Scores, share: float) -> tuple[nn.Module, EquivalenceReport, list[str]]:
        budget = self._budget.at(share, self._dense_size)
        return self._search(scores, share).slim(budget, self.example_inputs, self._exact, thorough=self._thorough)

    # ``share`` is that of the way to the ratio or target: the step's number ÷ steps.

    def _select_ratio(self, scores: Scores, share: float) -> Selection:
        free = [g for g in self._groups if g.reason is None and g.id not in self._ignored and g.id not in self._ratios]
        ratio = self._remaining_ratio(free, self._ratio, share) if self._global else 0.0
        whole = _outer_factors(free)
        own = {} if self._global else {g.id: self._remaining_ratio([g], self._ratio, share) for g in free}
        # An axis of heads times their channels loses its share by the channels; heads would add to it.
        own |= dict.fromkeys(own.keys() & whole, 0.0)
        limits = {
            **self._limits,
            "scope": self._scope,
            "ignored_groups": self._ignored,
            "ratios": self._remaining_ratios(share) | own,
        }
        return Selector(self._model, self._groups, scores, **limits).select(pruning_ratio=ratio)

    def _search(self, scores: Scores, share: float) -> BudgetSearch:
        return BudgetSearch(
            self._model,
            self._groups,
            self.example_inputs,
            scores,
            cost_power=self._cost_power,
            measure=search_measure(self._target),
            latencies=self._latencies,
            scope=self._scope if self._global else "layer",
            ignored_groups=self._ignored,
            ratios=self._remaining_ratios(share),
            **self._limits,
        )

    def _remaining_ratios(self, share: float) -> dict[str, float]:
        """The ratio of their current channels to prune from the groups of ``per_layer_ratio``."""
        return {
            g.id: self._remaining_ratio([g], self._ratios[g.id], share) for g in self._groups if g.id in self._ratios
        }

    def _remaining_ratio(self, groups: Sequence[Group], ratio: float, share: float) -> float:
        """The ratio of the current channels to prune so that ``ratio``·``share`` of the original ones are gone."""
        original, current = sum(self._widths[g.id] for g in groups), sum(g.channels for g in groups)
        kept = original - math.floor(ratio * share * original + 1e-9)
        return max(current - kept, 0) / max(current, 1)

    @property
    def _groups(self) -> list[Group]:
        if self._unfound is not None:
            self._find_groups(*self._unfound)
        return self._found

    def _find_groups(self, slim_model: nn.Module, before: Sequence[Group], plan: Plan) -> None:
        """Find the groups of the slim model, which may have other ids than those of the model before."""
        self._found, self._unfound = find_groups(slim_model, self.example_inputs), None
        pairs = {new.id: old.id for old, new in match_groups(before, plan, self._found)}
        self._widths = {new: self._widths[old] for new, old in pairs.items()}
        self._ratios = {new: self._ratios[old] for new, old in pairs.items() if old in self._ratios}
        self._ignored = {new for new, old in pairs.items() if old in self._ignored}

    def _advance(self, slim_model: nn.Module, plan: Plan) -> None:
        """Continue from the slim model."""
        self._model, self._unfound = slim_model, (slim_model, self._groups, plan)
        self.current_step += 1
        if self.current_step < self.steps:
            self._find_groups(*self._unfound)


def _check_arguments(
    model: nn.Module,
    pruning_ratio: float | None,
    target: Mapping[str, float] | None,
    per_layer_ratio: Mapping[Layer, float] | None,
    steps: int,
) -> None:
    ratios = {} if pruning_ratio is None else {"pruning_ratio": pruning_ratio}
    for layer, ratio in (per_layer_ratio or {}).items():
        ratios[f"per_layer_ratio of {layer if isinstance(layer, str) else type(layer).__name__}"] = ratio
    if not isinstance(model, nn.Module):
        raise PlanError(f"model is {type(model).__name__}, not a torch.nn.Module; pass the model itself")
    if pruning_ratio is not None and target is not None:
        raise PlanError("pruning_ratio and target are both given; give one of them")
    if target is None and not ratios:
        raise PlanError('give pruning_ratio=0.5 (of the channels) or target={"macs_ratio": 0.5}')
    for name, ratio in ratios.items():
        if not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise PlanError(f"{name}={ratio!r}: must be from 0 to 1; 0.3 prunes 30% of the channels")
    if target is not None and not isinstance(target, Mapping):
        raise PlanError(f'target={target!r}: must be a dict such as {{"macs_ratio": 0.5}}')
    if not isinstance(steps, int) or steps < 1:
        raise PlanError(f"steps={steps!r}: must be a whole number of at least 1")
    for key in target or {}:
        if key not in TARGETS:
            hint = suggest(str(key), list(TARGETS))
            raise PlanError(f"unknown target {key!r}{hint} known: {', '.join(TARGETS)}")


def _importance_function(importance: Importance, loss: Loss | None) -> Callable[[nn.Module, Sequence[Group]], Scores]:
    if isinstance(importance, str):
        function = registry.importances.get(importance)
        if importance in ("taylor", "ablation") and loss is None:
            raise PlanError(
                f"importance={importance!r} needs a loss: "
                "pass loss=lambda model: (criterion(model(x), y) for x, y in batches)"
            )
        losses = None if loss is None else _loss_batches(loss)
        return lambda model, groups: function(model, groups, losses)
    kind = type(importance).__name__
    if type(importance).__module__.startswith("torch_pruning"):
        known = ", ".join(map(repr, registry.importances.names()))
        raise PlanError(f"importance is torch-pruning's {kind}, which cannot score these groups; use one of {known}")
    if isinstance(importance, nn.Module) or not callable(importance):
        raise PlanError(
            f"importance is {kind}; pass a name such as 'magnitude', or a function of the model and its groups"
        )
    return importance


def _loss_batches(loss: Loss) -> Callable[[nn.Module], Iterable[Tensor]]:
    if isinstance(loss, nn.Module) or not callable(loss):
        raise PlanError(
            f"loss is {type(loss).__name__}, not a function of the model; pass "
            "loss=lambda model: (criterion(model(x), y) for x, y in batches)"
        )

    def losses(model: nn.Module) -> Iterable[Tensor]:
        result = loss(model)
        return [result] if isinstance(result, Tensor) else result

    return losses


def _outer_factors(groups: Sequence[Group]) -> set[str]:
    """Return the groups, such as heads, of which each channel has some of the channels of another group.

    Where one layer has the channels of each head side by side and another one the heads of each channel, the group with
    more channels is the inner one.
    """
    inner = defaultdict(list)
    for group in groups:
        for member in group.members:
            if member.repeats:
                inner[member.tensor, member.axis].append((group.id, member))
    found: set[str] = set()
    for group in sorted(groups, key=lambda group: group.channels):
        parts = (
            name
            for member in group.members
            for name, other in inner[member.tensor, member.axis]
            if other.stride < member.stride and 0 <= other.offset - member.offset < group.channels * member.stride
        )
        if any(name not in found for name in parts):
            found.add(group.id)
    return found


def _as_arrays(scores: Any) -> Scores:
    if not isinstance(scores, Mapping):
        kind = type(scores).__name__
        raise PlanError(f"importance returned {kind}; return a dict from group.id to an array of scores")
    return {name: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for name, v in scores.items()}


def _ratios_by_group(
    model: nn.Module, groups: Sequence[Group], per_layer_ratio: Mapping[Layer, float]
) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for layer, ratio in per_layer_ratio.items():
        for group_id in match_layers(model, groups, [layer], "per_layer_ratio"):
            if ratios.setdefault(group_id, ratio) != ratio:
                raise PlanError(
                    f"per_layer_ratio gives the channels of {group_id} the ratios {ratios[group_id]:g} and {ratio:g}, "
                    "and they can only be pruned together; give them one ratio"
                )
    return ratios


def _layer_widths(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    left = dict(after.named_modules())
    widths = {name: _output_channels(module) for name, module in before.named_modules()}
    return {name: (_output_channels(left.get(name)) or 0, width) for name, width in widths.items() if width is not None}


def _output_channels(module: nn.Module | None) -> int | None:
    width = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    return width if isinstance(width, int) and isinstance(getattr(module, "weight", None), Tensor) else None


def _change(before: int, after: int) -> str:
    return f"{before:,} → {after:,}" + (f" ({after / before:.1%})" if before else "")
