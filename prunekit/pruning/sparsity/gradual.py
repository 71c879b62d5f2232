"""Gradual pruning: chosen channels shrink to exact zero while training goes on, so that removing them changes nothing.

The schedule is the one of Zhu & Gupta ("To prune, or not to prune", 2017) on the gates of whole channels instead of on
single weights. As in Chen et al. ("Only Train Once", NeurIPS 2021), weight and bias of the norm go to zero together: a
channel with a bias would still emit a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import last_gates
from prunekit.pruning.plan import Group
from prunekit.utils import distributed

# (the model, k ÷ rounds in round k) → the channels to prune by group, also those of earlier rounds.
Choose = Callable[[nn.Module, float], Mapping[str, Iterable[int]]]


class GradualPruning:
    """Limits the gates and biases of chosen channels more and more after each optimizer step, down to zero.

    A channel that is chosen when the share t of its round is over has |γ| ≤ (1 − t)^power · |γ at the choice|, and its
    norm's bias likewise; the last norms that the channel passes are limited. Call :meth:`step` after each optimizer
    step.

    Args:
        model: in training.
        groups: of the model.
        choose: returns the channels to prune; called at the start of each round.
        total_steps: optimizer steps of the training.
        start: share of the steps after which the first round begins.
        end: share of the steps after which all chosen channels are zero; they stay zero.
        power: of the course to zero.
        rounds: of choosing channels; each takes the same number of steps.

    Attributes:
        round: number of the current round; 0 before the start.
        is_finished: whether all chosen channels are zero.

    Raises:
        PlanError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        choose: Choose,
        total_steps: int,
        *,
        start: float = 0.0,
        end: float = 0.5,
        power: float = 2.0,
        rounds: int = 1,
    ):
        if not 0 <= start < end <= 1:
            raise PlanError(f"start={start:g}, end={end:g}: must be shares of the steps with 0 <= start < end <= 1")
        if not power > 0 or rounds < 1 or total_steps < 1:
            raise PlanError(f"power={power:g}, rounds={rounds}, total_steps={total_steps}: must be above 0")
        self.model, self.total_steps, self.round = model, total_steps, 0
        self._choose, self._start, self._end, self._power, self._rounds = choose, start, end, power, rounds
        self._steps = 0
        self._groups = {group.id: group for group in groups if group.reason is None}
        norms = {group.gates[index].norm for group in self._groups.values() for index in last_gates(group)}
        self._parameters: list[nn.Parameter] = []
        self._offsets: dict[str, list[int]] = {}  # of the weight and the bias of each norm in one vector of all
        length = 0
        for norm in sorted(norms):
            module = model.get_submodule(norm)
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    self._parameters.append(parameter)
                    self._offsets.setdefault(norm, []).append(length)
                    length += len(parameter)
        self._limits = torch.full((length,), torch.inf)  # at the start of the round; ∞: not chosen

    @property
    def is_finished(self) -> bool:
        return self.round == self._rounds and self._remaining() == 0

    def step(self) -> bool:
        """Count one more optimizer step and limit the chosen channels; return whether a round has begun."""
        self._steps += 1
        begins = self.round < self._rounds and self._progress() >= self.round
        if begins:
            self._begin_round()
        if self.round:
            self._apply()
        return begins

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to continue, as JSON."""
        chosen = self._limits.isfinite().nonzero().flatten()
        limits = {"chosen": chosen.tolist(), "limits": self._limits[chosen].tolist()}
        return {"steps": self._steps, "round": self.round, **limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self.round = state["steps"], state["round"]
        self._limits = torch.full_like(self._limits, torch.inf)
        self._limits[state["chosen"]] = torch.tensor(state["limits"], dtype=self._limits.dtype)

    def _progress(self) -> float:
        """Rounds that are over."""
        share = self._steps / self.total_steps
        # Rounded, since 0.75 · 4 steps are 3.
        return round((share - self._start) / (self._end - self._start) * self._rounds, 9)

    def _remaining(self) -> float:
        """Share of their first limits that channels chosen in this round still have."""
        return max(0.0, self.round - self._progress()) ** self._power

    def _begin_round(self) -> None:
        self.round += 1
        chosen = torch.zeros(len(self._limits))
        for group_id, channels in self._choose(self.model, self.round / self._rounds).items():
            group = self._groups[group_id]
            index = torch.tensor(sorted(channels), dtype=torch.int64)
            for gate in (group.gates[number] for number in last_gates(group)):
                for offset in self._offsets[gate.norm]:
                    chosen[offset + gate.slice[0] + index] = 1.0
        chosen = distributed.broadcast(chosen).bool()
        values = torch.cat([parameter.detach().float().abs() for parameter in self._parameters]).cpu()
        self._limits = torch.where(chosen, values, torch.inf)

    @torch.no_grad()
    def _apply(self) -> None:
        first = self._parameters[0]
        self._limits = self._limits.to(first.device)
        limits = torch.where(self._limits.isinf(), self._limits, self._limits * self._remaining())
        parts = limits.split([len(parameter) for parameter in self._parameters])
        parts = [part.to(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]
        torch._foreach_minimum_(self._parameters, parts)
        torch._foreach_maximum_(self._parameters, torch._foreach_neg(parts))
