"""Pruning of dead channels while sparse training continues. See docs/design/sparsity.md for the definition of dead."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import effective_gates, last_gates, zeroing_masks
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.selection.budget import Budget
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.selection.extract import plan_from_selection
from prunekit.pruning.selection.selector import Selection, Selector
from prunekit.pruning.sparsity.dynamic_decay import Decay
from prunekit.pruning.sparsity.lambda_controller import LambdaController
from prunekit.pruning.surgery.compose import compose, match_groups
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.slim import apply_plan, slim

MIN_SAVING = 0.01  # share of the multiply-adds that makes a step worth its seconds
CHECK_IMAGES = 2  # of data, and twice as many of noise, in each equivalence check

MakeDecay = Callable[[nn.Module, list[Group]], tuple[Decay, LambdaController | None]]


@dataclass
class PrunedModel:
    """The result of one pruning step during training.

    Attributes:
        model: the smaller model, in train mode, on the device.
        groups: its groups.
        plan: what was pruned, in the channels of the model before.
        record: the figures to log: epoch, channels, sizes, the equivalence check.
    """

    model: nn.Module
    groups: list[Group]
    plan: Plan
    record: dict[str, Any]


class ProgressivePruning:
    """Prunes the dead channels of one training every few epochs.

    Args:
        model: as training starts with it.
        groups: its groups.
        example: a batch of data on the CPU, (N, C, H, W); the equivalence checks run on it.
        every: number of epochs between steps.
        threshold: of the effective gate.
        make_decay: returns a new decay and λ controller for a pruned model and its groups.
        budget: nothing is pruned below it.
        constants: as for ``slim``; "drop", which is not exact, acts as "carrier" during training.
        min_saving: share of the multiply-adds that a step must save; otherwise it waits for the next.
        limits: keyword arguments of :class:`Selector`.

    Attributes:
        plan: all that was pruned so far, in the channels of the initial model; None before the first step.
        records: those of each step.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        example: Tensor,
        *,
        every: int,
        threshold: float,
        make_decay: MakeDecay,
        budget: Budget | None = None,
        constants: str = "carrier",
        min_saving: float = MIN_SAVING,
        **limits: Any,
    ):
        self.initial_model = copy.deepcopy(model).to("meta")  # for its shapes
        self.initial_groups = list(groups)
        self.example = example[:CHECK_IMAGES]
        self.every, self.threshold, self.budget = every, threshold, budget
        self.make_decay = make_decay
        self.constants = "carrier" if constants == "drop" else constants
        self.min_saving, self.limits = min_saving, limits
        self.plan: Plan | None = None
        self.records: list[dict[str, Any]] = []
        self._max_gates: dict[str, np.ndarray] = {}
        self._decay_state: dict[str, Any] = {}
        # Dead channels that an earlier step had to keep: carriers, and those that the equivalence check needs.
        self._kept_dead: dict[str, set[int]] = {}

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether to prune after this epoch, from 1; never after the last, which extraction follows."""
        return epoch % self.every == 0 and epoch < epochs

    def reset(self, max_gates: Mapping[str, np.ndarray] | None = None) -> None:
        """Start a period of observation, or continue one from its :attr:`max_gates`."""
        self._max_gates = dict(max_gates or {})

    @property
    def max_gates(self) -> dict[str, np.ndarray]:
        """The largest effective gates since ``reset``: group id → (channels,) float64."""
        return dict(self._max_gates)

    def observe(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Record the current gates."""
        for group in groups:
            if group.reason is None:
                now = max_effective_gate(model, group)
                self._max_gates[group.id] = np.maximum(self._max_gates.get(group.id, now), now)

    def prune(self, model: nn.Module, groups: Sequence[Group], decay: Decay, epoch: int) -> PrunedModel | None:
        """Prune what was dead in all observations since ``reset``; return None if nothing was pruned.

        A failed equivalence check is recorded and does not stop the training.

        Args:
            model: in training; it is not changed.
            groups: its groups.
            decay: its decay.
            epoch: number of completed epochs.
        """
        started = time.perf_counter()
        size_model = SizeModel(model, groups, self.example.shape[1:])
        selection = self._select(model, groups, size_model)
        if selection is None:
            return None
        zeroed = zero_dead_rows(model, groups, selection.dead)
        try:
            plan = plan_from_selection(model, groups, selection)
            slim_model, check = slim(
                zeroed, plan, self.example, groups=groups, constants=self.constants, noise=2 * CHECK_IMAGES
            )
        except PlanError as error:
            self.records.append({"epoch": epoch, "channels": 0, "reason": str(error), "passed": False})
            return None
        assert check.plan is not None
        plan, slim_groups = check.plan, find_groups(slim_model, self.example)
        self._kept_dead = _kept_dead_channels(groups, selection.dead, plan, slim_groups)
        channels = sum(g.channels - len(plan.kept(g)) for g in groups if g.reason is None)
        if not channels:
            return None
        whole = plan
        if self.plan is not None:
            whole = compose(self.initial_model, self.initial_groups, self.plan, groups, plan)
        self.plan = whole.model_copy(update={"notes": []})
        self._decay_state = decay.state_dict()
        record = {
            "epoch": epoch,
            "channels": channels,
            "params": sum(parameter.numel() for parameter in slim_model.parameters()),
            "macs": size_model.size_without(dead_channels(groups, plan)).macs,
            **check.to_json(),
            "seconds": round(time.perf_counter() - started, 3),
        }
        self.records.append(record)
        return PrunedModel(slim_model, slim_groups, plan, record)

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as JSON."""
        return {
            "plan": None if self.plan is None else self.plan.to_json(),
            "kept_dead": {name: sorted(channels) for name, channels in self._kept_dead.items()},
            "decay": self._decay_state,
            "records": self.records,
        }

    def restore(self, model: nn.Module, groups: Sequence[Group], state: Mapping[str, Any]) -> list[Group]:
        """Load a state; give the initial model, in place, its shape at that state and return its groups.

        Raises:
            PlanError: the plan of that state does not fit the model.
        """
        self.records, self._decay_state = list(state["records"]), state["decay"]
        self._kept_dead = {name: set(channels) for name, channels in state["kept_dead"].items()}
        if state["plan"] is None:
            return list(groups)
        self.plan = Plan.from_json(state["plan"], "the plan of the pruned channels")
        apply_plan(model, self.plan, self.example)
        return find_groups(model, self.example)

    def continue_decay(
        self, model: nn.Module, groups: list[Group], controller: LambdaController | None
    ) -> tuple[Decay, LambdaController | None]:
        """Return a decay and a λ controller for a pruned model that continue those of the model before."""
        decay, new_controller = self.make_decay(model, groups)
        decay.load_state_dict(self._decay_state)
        if controller is not None and new_controller is not None:
            decay.weight = new_controller.load_state_dict(controller.state_dict())
        return decay, new_controller

    def kept_channels(self, norms: Iterable[str]) -> dict[str, np.ndarray]:
        """For some norms of the initial model, the indices of their channels that remain."""
        masks = {}
        if self.plan is not None:
            dead = dead_channels(self.initial_groups, self.plan)
            masks = Cutter(self.initial_model, self.initial_groups).masks(dead)
        widths = {name: len(self.initial_model.get_submodule(name).weight) for name in norms}
        return {name: np.flatnonzero(masks.get((f"{name}.weight", 0), np.ones(n, bool))) for name, n in widths.items()}

    def _select(self, model: nn.Module, groups: Sequence[Group], size_model: SizeModel) -> Selection | None:
        """The dead channels to prune; None if they save too little."""
        selector = Selector(model, groups, self._max_gates, **self.limits)
        selection = selector.select(threshold=self.threshold)
        if self.budget is not None and self._below_budget(size_model, selection):
            # As many, lowest scores first, as leave no less than the budget.
            low, high = 0, selection.pruned
            while low < high:
                middle = (low + high + 1) // 2
                below = self._below_budget(size_model, selector.select(count=middle, searched=True))
                low, high = (low, middle - 1) if below else (middle, high)
            selection = selector.select(count=low, searched=True)
        new = {name: channels - self._kept_dead.get(name, set()) for name, channels in selection.dead.items()}
        saving = 1 - size_model.size_without(new).macs / max(size_model.dense.macs, 1)
        return selection if saving > self.min_saving else None

    def _below_budget(self, size_model: SizeModel, selection: Selection) -> bool:
        return self.budget.size(size_model.size_without(selection.dead)) < self.budget.goal


def max_effective_gate(model: nn.Module, group: Group) -> np.ndarray:
    """The largest effective gate of each channel over the last gates of its rows, (channels,) float64; ∞ without gates.

    Unlike ``gate_scores``, a row whose last gate is open counts as open even if an earlier gate is zero.
    """
    last = [group.gates[index] for index in last_gates(group)]
    if not last:
        return np.full(group.channels, np.inf)
    return np.maximum.reduce([effective_gates(model.get_submodule(gate.norm))[slice(*gate.slice)] for gate in last])


@torch.no_grad()
def zero_dead_rows(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, set[int]]) -> nn.Module:
    """Zero the last gates of the dead channels' rows that an earlier gate has ended; return the model or a copy.

    ``slim`` itself zeroes the rows that no gate has ended, so that channels it keeps stay as trained.
    """
    result = model
    for group in groups:
        if not dead.get(group.id):
            continue
        wanted = np.zeros(group.channels, bool)
        wanted[list(dead[group.id])] = True
        masks = zeroing_masks(model, group, dead[group.id])
        for index in last_gates(group):
            gate, part = group.gates[index], slice(*group.gates[index].slice)
            weight = model.get_submodule(gate.norm).weight[part]
            more = torch.from_numpy(wanted & ~masks[index]).to(weight.device) & (weight != 0)
            if more.any():
                result = copy.deepcopy(model) if result is model else result
                result.get_submodule(gate.norm).weight[part][more] = 0
    return result


def _kept_dead_channels(
    groups: Sequence[Group], dead: Mapping[str, set[int]], plan: Plan, slim_groups: Sequence[Group]
) -> dict[str, set[int]]:
    """The dead channels that a plan keeps, as channels of the slim model's groups."""
    kept_dead = {}
    for group, slim_group in match_groups(groups, plan, slim_groups):
        kept = plan.kept(group)
        kept_dead[slim_group.id] = {k for k, channel in enumerate(kept) if channel in dead.get(group.id, ())}
    return {name: channels for name, channels in kept_dead.items() if channels}
