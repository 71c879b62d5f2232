"""Training that shrinks: channels that are dead are cut out while the sparse training goes on.

What is dead in the middle of a training? Under Adam, at the rates that bring gates down in time, a gate that is below
the threshold may just be crossing zero. Four definitions were weighed on the course of the gates in one run of the
default recipe (behind its seventh epoch of nine; of 1,235 channels 603 are dead in the end): below the threshold at
that moment, 521 channels, of which 17 live in the end; below half of it, 356 and 6; at every look (a look is every few
steps) since the epoch before, 377 and none; at every look of the epoch's second half, 462 and 7. The last is taken: it
finds most of them, and it has no past that a checkpoint would have to hold.

What does a cut move? It is made of two things. First the last gate of each row of a dead channel is set to zero, which
takes from the channel what it still let through: at most the threshold, in deviations of its norm. (A row that is ended
by an earlier gate alone is no row that has ended here: in train mode the norms behind it scale up again what its border
lets through.) Then what is left of the channel is a constant, the same in train and eval mode since no norm is behind
it, and cutting it is exact: a shift that a norm takes out again in train mode is moved into that norm's running mean,
other shifts into biases, and where readers pad, one dead channel stays as a carrier. The equivalence check of ``slim`` is taken of
that at each cut. So where gate and β are zero, the next step of the training is that of the model with these channels
held at zero. (Dropout between a dead channel's norm and its reader is an exception: it makes noise of a constant.)
"""

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
from prunekit.pruning.sparsity.decay import Decay
from prunekit.pruning.sparsity.lambda_controller import LambdaController
from prunekit.pruning.surgery.compose import compose, match_groups
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.make_plan import dead_channels
from prunekit.pruning.surgery.slim import apply_plan, slim

# A cut takes a few seconds, so it should spare some; the share of the multiply-adds.
WORTH = 0.01
# Of data, and twice as many of noise, in each of the equivalence checks: what differs differs on any image, and an equivalence check on eight
# and sixteen takes twice as long.
IMAGES = 2

# What drives the gates of a model that was cut, and what steers that.
Equip = Callable[[nn.Module, list[Group]], tuple[Decay, LambdaController | None]]


@dataclass
class Cut:
    """One cut in the middle of a training.

    Attributes:
        model: what is left, in train mode, on the device.
        groups: of it.
        plan: what was cut, in the channels of the model before.
        record: what is written down of it: epoch, channels, sizes, the equivalence check.
    """

    model: nn.Module
    groups: list[Group]
    plan: Plan
    record: dict[str, Any]


class ProgressivePruning:
    """The cuts of one training.

    Args:
        model: as the training starts with it.
        groups: of it.
        example: a batch of data on the CPU, (N, C, H, W); the equivalence checks run on it.
        every: epochs between two cuts.
        threshold: of the effective gate.
        equip: for a model that was cut and its groups, a new decay and what steers it.
        goal: a budget below which nothing is cut.
        constants: as for ``slim``; with "drop", which is not exact, "carrier" in the middle of a training.
        worth: the share of multiply-adds that a cut has to spare; below it, it waits for the next.
        limits: ``min_channels``, ``round_to`` and ``ignored_layers``, as for ``extract``.

    Attributes:
        plan: all that was cut so far, in the channels of the first model; None before the first cut.
        records: of each cut.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        example: Tensor,
        *,
        every: int,
        threshold: float,
        equip: Equip,
        goal: Budget | None = None,
        constants: str = "carrier",
        worth: float = WORTH,
        **limits: Any,
    ):
        self.first = copy.deepcopy(model).to("meta")  # for its shapes
        self.first_groups = list(groups)
        self.example = example[:IMAGES]
        self.every, self.threshold, self.goal = every, threshold, goal
        self.equip = equip
        self.constants = "carrier" if constants == "drop" else constants
        self.worth, self.limits = worth, limits
        self.plan: Plan | None = None
        self.records: list[dict[str, Any]] = []
        self._highest: dict[str, np.ndarray] = {}
        self._told: dict[str, Any] = {}
        self._staying: dict[
            str, set[int]
        ] = {}  # dead channels that have been found to stay: carriers, those given back

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether a cut comes behind this epoch, counted from 1: none behind the last, since extraction follows."""
        return epoch % self.every == 0 and epoch < epochs

    def begin(self, seen: Mapping[str, np.ndarray] | None = None) -> None:
        """Forget what was seen, or go on from what :meth:`seen` gave."""
        self._highest = dict(seen or {})

    def seen(self) -> dict[str, np.ndarray]:
        """How high the gates stood at most, at the looks since ``begin``: group → (channels,) float64."""
        return dict(self._highest)

    def look(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """See how high the gates stand now."""
        for group in groups:
            if group.reason is None:
                now = height(model, group)
                self._highest[group.id] = np.maximum(self._highest.get(group.id, now), now)

    def cut(self, model: nn.Module, groups: Sequence[Group], decay: Decay, epoch: int) -> Cut | None:
        """Cut what has been dead at all looks since ``begin``; None where nothing has, or nothing may go.

        Where no equivalence check passed nothing is cut, and the record says why: a training does not end for that.

        Args:
            model: under training; it is left as it is.
            groups: of it.
            decay: of it.
            epoch: that is done, from 1.
        """
        began = time.perf_counter()
        sizes = SizeModel(model, groups, self.example.shape[1:])
        dead = self._choose(model, groups, sizes)
        if dead is None:
            return None
        quiet = unresponsive_channels(model, groups, dead.dead)
        try:
            plan = plan_from_selection(model, groups, dead)
            small, equivalence = slim(
                quiet, plan, self.example, groups=groups, constants=self.constants, noise=2 * IMAGES
            )
        except PlanError as error:
            self.records.append({"epoch": epoch, "channels": 0, "reason": str(error), "passed": False})
            return None
        plan, left = equivalence.plan, find_groups(small, self.example)
        self._staying = _staying(groups, dead.dead, plan, left)
        channels = sum(g.channels - len(plan.kept(g)) for g in groups if g.reason is None)
        if not channels:  # all were given back
            return None
        whole = plan if self.plan is None else compose(self.first, self.first_groups, self.plan, groups, plan)
        self.plan = whole.model_copy(update={"notes": []})
        self._told = decay.state()
        record = {
            "epoch": epoch,
            "channels": channels,
            "params": sum(parameter.numel() for parameter in small.parameters()),
            "macs": sizes.size_without(dead_channels(groups, plan)).macs,
            **equivalence.to_json(),
            "seconds": round(time.perf_counter() - began, 3),
        }
        self.records.append(record)
        return Cut(small, left, plan, record)

    def state(self) -> dict[str, Any]:
        """All that changes, as JSON."""
        return {
            "plan": None if self.plan is None else self.plan.to_json(),
            "staying": {name: sorted(channels) for name, channels in self._staying.items()},
            "decay": self._told,
            "cuts": self.records,
        }

    def restore(self, model: nn.Module, groups: Sequence[Group], state: Mapping[str, Any]) -> list[Group]:
        """Give the first model, in place, the shape that it had at a ``state``; the groups of what is left.

        Raises:
            PlanError: the plan of that state does not fit the model.
        """
        self.records, self._told = list(state["cuts"]), state["decay"]
        self._staying = {name: set(channels) for name, channels in state["staying"].items()}
        if state["plan"] is None:
            return list(groups)
        self.plan = Plan.from_json(state["plan"], "the plan of cuts so far")
        apply_plan(model, self.plan, self.example)
        return find_groups(model, self.example)

    def equipped(
        self, model: nn.Module, groups: list[Group], before: LambdaController | None
    ) -> tuple[Decay, LambdaController | None]:
        """Decay and steering of what a cut has left, which go on as those before."""
        decay, steering = self.equip(model, groups)
        decay.load(self._told)
        if before is not None and steering is not None:
            decay.weight = steering.load(before.state())
        return decay, steering

    def places(self, norms: Iterable[str]) -> dict[str, np.ndarray]:
        """For each of these norms of the first model, which of its channels are left."""
        masks = (
            {}
            if self.plan is None
            else Cutter(self.first, self.first_groups).masks(dead_channels(self.first_groups, self.plan))
        )
        width = {name: len(self.first.get_submodule(name).weight) for name in norms}
        return {name: np.flatnonzero(masks.get((f"{name}.weight", 0), np.ones(n, bool))) for name, n in width.items()}

    def _choose(self, model: nn.Module, groups: Sequence[Group], sizes: SizeModel) -> Selection | None:
        """What is dead and may go; None where that is not worth a cut."""
        selector = Selector(model, groups, self._highest, **self.limits)
        choice = selector.select(threshold=self.threshold)
        if self.goal is not None and self.goal.size(sizes.size_without(choice.dead)) < self.goal.goal:
            choice = self._above_goal(selector, sizes, choice.pruned)
        gone = {name: channels - self._staying.get(name, set()) for name, channels in choice.dead.items()}
        spared = 1 - sizes.size_without(gone).macs / max(sizes.dense.macs, 1)
        return choice if spared > self.worth else None

    def _above_goal(self, selector: Selector, sizes: SizeModel, most: int) -> Selection:
        """The last channels that a budget asks for are chosen when the training has ended, by the recipe's criterion;
        so here as many go, the least first, as leave no less than the budget."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            stays = (
                self.goal.size(sizes.size_without(selector.select(count=middle, searched=True).dead)) >= self.goal.goal
            )
            low, high = (middle, high) if stays else (low, middle - 1)
        return selector.select(count=low, searched=True)


def height(model: nn.Module, group: Group) -> np.ndarray:
    """The largest effective gate of each channel among the last of its rows, (channels,) float64; ∞ where no gate
    decides. Unlike ``life.scores`` it does not count a row as over where an earlier gate alone is zero."""
    last = [group.gates[index] for index in last_gates(group)]
    if not last:
        return np.full(group.channels, np.inf)
    return np.maximum.reduce([effective_gates(model.get_submodule(gate.norm))[slice(*gate.slice)] for gate in last])


@torch.no_grad()
def unresponsive_channels(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, set[int]]) -> nn.Module:
    """The model, or a copy of it, in which the dead channels' rows that an earlier gate has ended end at the last one
    too. Those that no gate has ended yet ``slim`` ends itself; what it gives back then lives as it did.
    """
    copied = model
    for group in groups:
        if not dead.get(group.id):
            continue
        wanted = np.zeros(group.channels, bool)
        wanted[list(dead[group.id])] = True
        closed = zeroing_masks(model, group, dead[group.id])
        for index in last_gates(group):
            gate, part = group.gates[index], slice(*group.gates[index].slice)
            weight = model.get_submodule(gate.norm).weight[part]
            more = torch.from_numpy(wanted & ~closed[index]).to(weight.device) & (weight != 0)
            if more.any():
                copied = copy.deepcopy(model) if copied is model else copied
                copied.get_submodule(gate.norm).weight[part][more] = 0
    return copied


def _staying(
    groups: Sequence[Group], dead: Mapping[str, set[int]], plan: Plan, left: Sequence[Group]
) -> dict[str, set[int]]:
    """The dead channels that a cut has kept, in the groups of what is left."""
    found = {}
    for group, small in match_groups(groups, plan, left):
        kept = plan.kept(group)
        found[small.id] = {place for place, channel in enumerate(kept) if channel in dead.get(group.id, ())}
    return {name: channels for name, channels in found.items() if channels}
