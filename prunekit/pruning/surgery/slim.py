"""Rebuilding a dense model with the channels that a plan keeps, and checking that the result is equivalent."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.axes import output_axis
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.liveness import dead_layers
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.provenance import record_plan
from prunekit.pruning.surgery.constant_folding import (
    Constants,
    Folding,
    apply_folding,
    measure_constants,
    plan_folding,
    zero_inputs,
)
from prunekit.pruning.surgery.copies import clone, copy_as, transfer
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.equivalence import (
    DEAD,
    SENSITIVE,
    EquivalenceReport,
    check_equivalence,
    check_inputs,
    check_repeatable,
    noise_batch,
    output_difference,
    zero_dead_gates,
)
from prunekit.pruning.surgery.plan_builder import dead_channels, plan_from_dead
from prunekit.pruning.surgery.training_check import check_training
from prunekit.utils.compiled import unwrap
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line, join_names, plural

CONSTANTS = ("carrier", "fold", "keep", "drop")


def slim(
    model: nn.Module,
    plan: Plan,
    example: Tensor,
    *,
    groups: Sequence[Group] | None = None,
    constants: str = "carrier",
    noise: int = 16,
) -> tuple[nn.Module, EquivalenceReport]:
    """Rebuild a model with only the channels that a plan keeps, and check that it computes the same.

    Args:
        model: the dense model; it is left unchanged.
        plan: from ``extract``.
        example: a batch of data, (N, C, H, W), for the equivalence check.
        groups: of the model, if already known.
        constants: how to handle the constants that dead channels emit. "carrier": fold them into the modules that read
            them; where such a module pads with zeros, keep one dead channel of the group to carry them. "fold": fold
            them as if nothing padded. "keep": keep dead channels that emit a nonzero constant. With these three, dead
            channels are given back, largest constant first, until the check passes. "drop": cut them with their
            channels; the check reports the difference and may fail.
        noise: number of noise images in the check besides the data, at least 2.

    Returns:
        The slim model, in the dense model's precision, device, memory format and mode, and the report of the
        equivalence check. Its ``plan``, not the plan of ``extract``, is that of the slim model, since channels may have
        been given back; ``save`` stores both together. For the optimizer see ``slim_optimizer``.

    Raises:
        PlanError: the plan does not fit the model, the equivalence check fails, or the slim model cannot be trained.
    """
    if constants not in CONSTANTS:
        raise PlanError(f"constants={constants!r}: must be one of {', '.join(CONSTANTS)}")
    model = unwrap(model)
    groups = find_groups(model, example) if groups is None else groups
    plan.check(list(groups))
    reference = copy_as(model, torch.float64)
    inputs = check_inputs(reference, example)
    attempt = _Attempt(reference, groups, inputs, _noise(reference, inputs, noise), constants)
    slimmed, report = attempt.run(dead_channels(groups, plan))
    if not report.passed and not (constants == "drop" and math.isfinite(report.max_abs_diff)):
        raise PlanError(
            f"the slim model is not equivalent to the dense model with its dead gates at zero: {report.reason}"
            + (_dead_network_hint(model, groups) if report.reason == DEAD else "")
        )
    report.float32_diff, _ = output_difference(
        copy_as(attempt.gated, torch.float32), copy_as(slimmed, torch.float32), [batch.float() for batch in inputs]
    )
    # The plan is applied to a fresh copy: the checked one may have kept something of the check, such as a cache.
    result = _shape_like(clone(model), groups, report.plan)
    transfer(slimmed, result)
    check_training(reference, copy_as(result, torch.float64), inputs[0][:2])
    report.plan.notes = [*plan.notes, *_notes(groups, plan, report)]
    record_plan(result, model, report.plan, example.shape[1:])
    return result, report


def _noise(model: nn.Module, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    try:
        check_repeatable(model, inputs[0])
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"the equivalence check runs a copy of the model in float64 on the CPU, and that fails: "
            f"{first_line(error)}; if the model creates tensors of a fixed dtype or device, take both from its input"
        ) from error
    noise = noise_batch(model, inputs[0], count)
    return [] if noise is None else [noise]


def rebuild(
    gated: nn.Module,
    groups: Sequence[Group],
    dead: Mapping[str, set[int]],
    inputs: Sequence[Tensor],
    constants: str = "carrier",
) -> tuple[Plan, Folding]:
    """Cut dead channels in place and replace their constants, without an equivalence check.

    Args:
        gated: in eval mode, with the gates of the dead channels at zero (``zero_dead_gates``); becomes the slim model.
        groups: of that model.
        dead: by group, from ``Cutter.complete``.
        inputs: varied batches in the model's precision, with borders and interiors, to measure the constants on.
        constants: "carrier", "fold" or "drop", as for ``slim``.
    """
    measured, cutter = measure_constants(gated, groups, dead, inputs), Cutter(gated, groups)
    if constants == "drop":
        folding = Folding(inexact=measured.output_shifts(carried=False, dropped=True))
    else:
        folding = plan_folding(measured, constants == "carrier")
    biases = apply_folding(gated, folding)
    cut = {name: set(channels) - set(folding.carriers.get(name, ())) for name, channels in dead.items()}
    # A carrier keeps its group, but not what depends on the group, nor the balance of grouped convolutions.
    completed, removed = cutter.complete(cut)
    if constants != "drop":
        unread = {name: channels - completed[name] for name, channels in cut.items()}
        zero_inputs(gated, groups, unread)
        folding.unread = sum(map(len, unread.values()))
    plan = plan_from_dead(gated, groups, completed, removed)
    plan.added_bias, plan.carriers = cutter.cut(gated, completed, removed, biases), folding.carriers
    folding.lost = set(biases) - set(plan.added_bias)
    return plan, folding


@dataclass
class _Attempt:
    """Slims one model with different sets of dead channels until the equivalence check passes."""

    model: nn.Module
    groups: Sequence[Group]
    inputs: Sequence[Tensor]
    noise: Sequence[Tensor]
    constants: str

    def __post_init__(self) -> None:
        self.cutter = Cutter(self.model, self.groups)
        self.gated = self.model  # the reference of the last check
        self.lost: set[str] = set()

    def run(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        """Slim with all dead channels that can be cut."""
        kept = []
        if self.constants == "keep":
            kept = self._measure(dead).nonzero()
            dead = _without(self.cutter.complete(dead)[0], kept)
        slimmed, report = self._slim(dead)
        if not report.passed and self.constants != "drop" and SENSITIVE not in (report.reason or ""):
            slimmed, report = self._give_back(dead)
        report.given_back += len(kept)
        return slimmed, report

    def _give_back(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        """Keep as few dead channels that cannot be replaced as the check needs, largest constant first."""
        carried, given_back, shifts = self.constants == "carrier", 0, {}
        while True:
            measured = self._measure(dead)
            dead = self.cutter.complete(dead)[0]
            inexact = measured.inexact(carried, self.lost)
            shifts |= measured.output_shifts(carried)
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
        self.gated = zero_dead_gates(self.model, self.groups, dead)
        slimmed = copy_module(self.gated)
        plan, folding = rebuild(slimmed, self.groups, dead, [*self.inputs, *self.noise], self.constants)
        self.lost |= folding.lost
        return slimmed, self._check(slimmed, plan, folding)

    def _check(self, slimmed: nn.Module, plan: Plan, folding: Folding) -> EquivalenceReport:
        report = check_equivalence(self.gated, slimmed, self.inputs)
        for batch in self.noise if report.passed else ():
            # Checked apart, because its outputs may be larger and allow a larger tolerance.
            other = check_equivalence(self.gated, slimmed, [batch])
            if other.reason not in (None, DEAD):
                report.passed, report.reason = False, f"on noise {other.reason}"
        report.folded, report.carriers = folding.folded, sum(map(len, folding.carriers.values()))
        report.inexact, report.unread, report.plan = folding.inexact, folding.unread, plan
        return report

    def _measure(self, dead: Mapping[str, set[int]]) -> Constants:
        dead = self.cutter.complete(dead)[0]
        gated = zero_dead_gates(self.model, self.groups, dead)
        return measure_constants(gated, self.groups, dead, [*self.inputs, *self.noise])


def _without(dead: Mapping[str, set[int]], kept: Sequence[tuple[float, str, int]]) -> dict[str, set[int]]:
    kept = {(name, channel) for _, name, channel in kept}
    return {name: {k for k in channels if (name, k) not in kept} for name, channels in dead.items()}


def _dead_network_hint(model: nn.Module, groups: Sequence[Group]) -> str:
    if layers := dead_layers(model, groups):
        return f", every gate of {join_names(layers)} is zero; train with a lower decay.weight"
    return "; prune fewer channels, or train with a lower rate or decay.weight"


def _notes(groups: Sequence[Group], plan: Plan, report: EquivalenceReport) -> list[str]:
    """Notes on channels that are kept, or constants that are dropped, because they cannot be replaced."""
    notes = []
    largest = sorted(report.inexact.items(), key=lambda item: -item[1])
    names = ", ".join(f"{name} by up to {size:.2g}" for name, size in largest[:3])
    names += f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    if report.given_back:
        shifts = f"; their constants would move {names}" if largest else ""
        notes.append(f"{report.given_back} dead channels stay, since cutting them would change the output{shifts}")
    elif largest:
        notes.append(f"constants are dropped, which moves {names}")
    if report.unread:
        channels = plural(report.unread, "dead channel")
        notes.append(f"{channels} kept with weights of zero, so that the groups of a convolution stay of one size")
    whole = [g for g in groups if g.id in report.plan.carriers and len(report.plan.kept(g)) == g.channels]
    if whole:
        number = sum(g.channels - len(plan.kept(g)) for g in whole)
        notes.append(
            f"nothing is cut of {join_names([g.id for g in whole])}: what is dead there ({number}) carries constants"
        )
    return notes


def apply_plan(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Give a dense model the shape of a plan, in place, to load the slim model's weights next.

    The plan is that of the check (``EquivalenceReport.plan``). ``save`` and ``load`` do both steps at once.

    Raises:
        PlanError: the plan does not fit the model.
    """
    model = unwrap(model)
    groups = find_groups(model, example)
    plan.check(groups)
    return _shape_like(model, groups, plan)


def _shape_like(model: nn.Module, groups: Sequence[Group], plan: Plan) -> nn.Module:
    cutter = Cutter(model, groups)
    dead, removed = cutter.complete(dead_channels(groups, plan))
    if differing := sorted(set(removed) ^ set(plan.removed)):
        raise PlanError(f"the plan's channels and its removed modules disagree about {differing[0]}; extract it again")
    cutter.cut(model, dead, removed)
    modules = dict(model.named_modules())
    for name in plan.added_bias:
        module = modules.get(name)
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise PlanError(f"the plan adds a bias to {name!r}, which has no weight; extract it again")
        module.bias = nn.Parameter(module.weight.detach().new_zeros(module.weight.shape[output_axis(module)]))
    return model
