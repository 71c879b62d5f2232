"""Slimming without drift: dead channels whose constants cannot be replaced exactly are given back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from prunekit.pruning.plan import Group
from prunekit.pruning.surgery.constant_folding import Constants, measure_constants
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.equivalence import SENSITIVE, EquivalenceReport, check_all, zero_dead_gates
from prunekit.pruning.surgery.masked_statistics import mask_statistics
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.rebuild import rebuild
from prunekit.utils.copying import copy_module
from prunekit.utils.inputs import Example


@dataclass
class ExactSlimming:
    """Slims one model with different sets of dead channels until it equals the model with their gates at zero."""

    model: nn.Module
    groups: Sequence[Group]
    inputs: Sequence[Example]
    noise: Sequence[Example]

    def __post_init__(self) -> None:
        self.cutter = Cutter(self.model, self.groups)
        self.reference = self.model  # of the last check
        self.lost: set[str] = set()

    def run(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        """Slim with all dead channels that can be cut."""
        slimmed, report = self._slim(dead)
        if not report.passed and SENSITIVE not in (report.reason or ""):
            slimmed, report = self._give_back(dead)
        return slimmed, report

    def _give_back(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        """Keep as few dead channels that cannot be replaced as the check needs, largest constant first."""
        given_back, shifts = 0, {}
        while True:
            dead = self.cutter.complete(dead)[0]
            gated = zero_dead_gates(self.model, self.groups, dead)
            measured = self._measure(gated, dead)
            inexact = measured.inexact(self.lost)
            shifts |= measured.output_shifts()
            # Each channel given back brings the models closer, so bisection finds the number.
            number = bisect_left(
                range(len(inexact)), True, key=lambda n, d=dead, i=inexact: self._slim(_without(d, i[:n]))[1].passed
            )
            dead, given_back = _without(dead, inexact[:number]), given_back + number
            slimmed, report = self._slim(dead)
            # A channel given back may make another one vary that was constant, as in a squeeze-and-excitation.
            if report.passed or not number:
                report.given_back, report.inexact = given_back, shifts
                return slimmed, report

    def _slim(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        dead = self.cutter.complete(dead)[0]
        gated = zero_dead_gates(self.model, self.groups, dead)
        slimmed = copy_module(gated)
        constants = self._measure(slimmed, dead)
        plan, folding = rebuild(slimmed, self.groups, dead, constants, carry=True)
        self.lost |= folding.lost
        # Carriers are left, and count in statistics.
        self.reference = mask_statistics(gated, self.groups, dead_channels(self.groups, plan))
        report = check_all(self.reference, slimmed, self.inputs, self.noise)
        report.folded, report.carriers = folding.folded, sum(map(len, folding.carriers.values()))
        report.unread, report.plan = folding.unread, plan
        return slimmed, report

    def _measure(self, model: nn.Module, dead: Mapping[str, set[int]]) -> Constants:
        """The constants of dead channels where statistics leave them out, as in the slim model."""
        masked = mask_statistics(model, self.groups, dead)
        return measure_constants(model, self.groups, dead, [*self.inputs, *self.noise], masked)


def _without(dead: Mapping[str, set[int]], kept: Sequence[tuple[float, str, int]]) -> dict[str, set[int]]:
    kept = {(name, channel) for _, name, channel in kept}
    return {name: {k for k in channels if (name, k) not in kept} for name, channels in dead.items()}
