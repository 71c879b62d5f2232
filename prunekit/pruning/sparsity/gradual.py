"""Gradual pruning: chosen channels shrink to exact zero while training goes on, so that removing them changes nothing.

The schedule is the one of Zhu & Gupta ("To prune, or not to prune", 2017) on the gates of whole channels instead of on
single weights. As in Chen et al. ("Only Train Once", NeurIPS 2021), weight and bias of the norm go to zero together: a
channel with a bias would still emit a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import shrinking_rows
from prunekit.pruning.graph.silence import Rows
from prunekit.pruning.plan import Group
from prunekit.utils import distributed

# (the model, k ÷ rounds in round k) → the channels to prune by group, also those of earlier rounds.
Choose = Callable[[nn.Module, float], Mapping[str, Iterable[int]]]


class GradualPruning:
    """Limits the gates and biases of chosen channels more and more after each optimizer step, down to zero.

    A channel that is chosen when the share t of its round is over has |γ| ≤ (1 − t)^power · |γ at the choice|, and its
    norm's bias likewise; the last norms that the channel passes are limited. Where it passes none, the L2 norm of the
    weights that produce it is limited in the same way, and the bias. Call :meth:`step` after each optimizer step.

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
        self._rows = {group.id: list(shrinking_rows(model, group)) for group in self._groups.values()}
        by_axis = {_key(rows): rows for own in self._rows.values() for rows in own}
        self._slices = [by_axis[key] for key in sorted(by_axis)]
        lengths = [rows.parameter.shape[rows.axis] for rows in self._slices]
        # Where each tensor begins in one vector of all.
        self._offsets = dict(zip(map(_key, self._slices), [0, *accumulate(lengths)], strict=False))
        self._lengths = lengths
        self._limits = torch.full((sum(lengths),), torch.inf)  # at the start of the round; ∞: not chosen

    @property
    def is_finished(self) -> bool:
        return self.round == self._rounds and self._remaining() == 0

    def begins_with(self, count: int = 1) -> bool:
        """Return whether a round begins with so many optimizer steps more."""
        return self.round < self._rounds and self._progress(count) >= self.round

    def step(self, count: int = 1) -> bool:
        """Count one more optimizer step and limit the chosen channels; return whether a round has begun.

        Args:
            count: of ``total_steps`` that this step is, where some advance the training further than others.
        """
        begins = self.begins_with(count)
        self._steps += count
        if begins:
            self._begin_round()
        if self.round and self._slices:
            self._apply()
        return begins

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to continue, as JSON."""
        limits = {}
        for rows, own in zip(self._slices, self._limits.cpu().split(self._lengths), strict=True):
            chosen = own.isfinite().nonzero().flatten()
            if len(chosen):
                limits[_key(rows)] = {"entries": chosen.tolist(), "limits": own[chosen].tolist()}
        return {"steps": self._steps, "round": self.round, "limits": limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self.round = state["steps"], state["round"]
        self._limits = torch.full_like(self._limits, torch.inf)
        for key, own in state["limits"].items():
            entries = self._offsets[key] + torch.tensor(own["entries"])
            self._limits[entries] = torch.tensor(own["limits"], dtype=self._limits.dtype)

    def _progress(self, more: int = 0) -> float:
        """Rounds that are over, after so many steps more."""
        share = (self._steps + more) / self.total_steps
        # Rounded, since 0.75 · 4 steps are 3.
        return round((share - self._start) / (self._end - self._start) * self._rounds, 9)

    def _remaining(self) -> float:
        """Share of their first limits that channels chosen in this round still have."""
        return max(0.0, self.round - self._progress()) ** self._power

    def _begin_round(self) -> None:
        self.round += 1
        chosen = torch.zeros(len(self._limits))
        for group_id, channels in self._choose(self.model, self.round / self._rounds).items():
            index = np.array(sorted(channels), np.int64)
            for rows in self._rows[group_id]:
                chosen[self._offsets[_key(rows)] + rows.of(index).cpu()] = 1.0
        chosen = distributed.broadcast(chosen).bool()
        values = torch.cat([torch.zeros(0), *(_sizes(rows).cpu() for rows in self._slices)])
        self._limits = torch.where(chosen, values, torch.inf)

    @torch.no_grad()
    def _apply(self) -> None:
        self._limits = self._limits.to(self._slices[0].parameter.device)
        limits = torch.where(self._limits.isinf(), self._limits, self._limits * self._remaining())
        pairs = list(zip(self._slices, limits.split(self._lengths), strict=True))
        vectors = [(rows.parameter, part.to(rows.parameter)) for rows, part in pairs if rows.parameter.dim() == 1]
        if vectors:
            parameters, parts = map(list, zip(*vectors, strict=True))
            torch._foreach_minimum_(parameters, parts)
            torch._foreach_maximum_(parameters, torch._foreach_neg(parts))
        for rows, part in pairs:
            if rows.parameter.dim() > 1:
                sizes = _sizes(rows)
                # Weights may be so small that their squares, and so their norm, are zero.
                factor = torch.where(sizes > part, part / sizes, (part > 0).float()).to(rows.parameter)
                rows.parameter.mul_(factor.view([-1 if d == rows.axis else 1 for d in range(rows.parameter.dim())]))


def _key(rows: Rows) -> str:
    """The name of an axis of a tensor; of most, only the first has entries of channels that shrink."""
    return f"{rows.tensor}:{rows.axis}" if rows.axis else rows.tensor


def _sizes(rows: Rows) -> Tensor:
    """The L2 norm of each entry of the axis, (length,)."""
    other = [axis for axis in range(rows.parameter.dim()) if axis != rows.axis]
    weights = rows.parameter.detach().float()
    return torch.linalg.vector_norm(weights, dim=other) if other else weights.abs()
