"""Rebuilding a dense model with the channels that a plan keeps, and checking that the result is equivalent."""

from __future__ import annotations

import copy
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
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.equivalence import (
    DEAD,
    EquivalenceReport,
    check_equivalence,
    check_inputs,
    noise_batch,
    output_difference,
    zero_dead_gates,
)
from prunekit.pruning.surgery.plan_builder import dead_channels, plan_from_dead
from prunekit.utils.text import first_line, join_names

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
        The slim model, in the dense model's precision, device and mode, and the report of the equivalence check,
        whose ``plan`` is the plan of the slim model. For the optimizer see ``slim_optimizer``.

    Raises:
        PlanError: the plan does not fit the model, or the equivalence check fails.
    """
    if constants not in CONSTANTS:
        raise PlanError(f"constants={constants!r}: must be one of {', '.join(CONSTANTS)}")
    groups = find_groups(model, example) if groups is None else groups
    plan.check(list(groups))
    reference = _float64_copy(model)
    inputs = check_inputs(reference, example)
    attempt = _Attempt(reference, groups, inputs, _noise(reference, inputs, noise), constants)
    slimmed, report = attempt.run(dead_channels(groups, plan))
    if not report.passed and not (constants == "drop" and math.isfinite(report.max_abs_diff)):
        raise PlanError(
            f"the slim model is not equivalent to the dense model with its dead gates at zero: {report.reason}"
            + (_dead_network_hint(model, groups) if report.reason == DEAD else "")
        )
    report.float32_diff, _ = output_difference(
        attempt.gated.float(), copy.deepcopy(slimmed).float(), [batch.float() for batch in inputs]
    )
    report.plan.notes = [*plan.notes, *_inexact_note(report)]
    slimmed = _restore_types(slimmed, model)
    record_plan(slimmed, model, report.plan, example.shape[1:])
    return slimmed, report


def _float64_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).double().cpu().eval()
    except RuntimeError as error:
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); if it keeps computed tensors, as the old spectral_norm "
            "does, remove that first (torch.nn.utils.remove_spectral_norm)"
        ) from error


def _noise(model: nn.Module, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    try:
        with torch.inference_mode():
            model(inputs[0])
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
        zero_inputs(gated, groups, {name: channels - completed[name] for name, channels in cut.items()})
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
        if not report.passed and self.constants != "drop":
            slimmed, report = self._give_back(dead)
        report.given_back += len(kept)
        return slimmed, report

    def _give_back(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        """Keep as few dead channels that cannot be replaced as the check needs, largest constant first."""
        measured, carried = self._measure(dead), self.constants == "carrier"
        dead = self.cutter.complete(dead)[0]
        inexact = measured.inexact(carried, self.lost)
        # Each channel given back brings the models closer, so bisection finds the number.
        number = bisect_left(range(len(inexact)), True, key=lambda n: self._slim(_without(dead, inexact[:n]))[1].passed)
        slimmed, report = self._slim(_without(dead, inexact[:number]))
        report.given_back, report.inexact = number, measured.output_shifts(carried)
        return slimmed, report

    def _slim(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        dead = self.cutter.complete(dead)[0]
        self.gated = zero_dead_gates(self.model, self.groups, dead)
        slimmed = copy.deepcopy(self.gated)
        plan, folding = rebuild(slimmed, self.groups, dead, [*self.inputs, *self.noise], self.constants)
        self.lost |= folding.lost
        return slimmed, self._check(slimmed, plan, folding)

    def _check(self, slimmed: nn.Module, plan: Plan, folding: Folding) -> EquivalenceReport:
        report = check_equivalence(self.gated, slimmed, self.inputs)
        for batch in self.noise if report.passed else ():
            # Checked apart, because its outputs may be larger and allow a larger tolerance.
            other = check_equivalence(self.gated, slimmed, [batch])
            if not other.max_abs_diff <= other.tolerance:
                report.passed, report.reason = False, f"on noise {other.reason}"
        report.folded, report.carriers = folding.folded, sum(map(len, folding.carriers.values()))
        report.inexact, report.plan = folding.inexact, plan
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


def _inexact_note(report: EquivalenceReport) -> list[str]:
    """A note on channels that are kept, or constants that are dropped, because they cannot be replaced."""
    if not report.inexact and not report.given_back:
        return []
    largest = sorted(report.inexact.items(), key=lambda item: -item[1])
    names = ", ".join(f"{name} by up to {size:.2g}" for name, size in largest[:3])
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    if not report.given_back:
        return [f"constants are dropped, which moves {names}{more}"]
    shifts = f"; their constants would move {names}{more}" if largest else ""
    return [f"{report.given_back} dead channels stay, since cutting them would change the output{shifts}"]


def _restore_types(slimmed: nn.Module, model: nn.Module) -> nn.Module:
    """Give a slim model the precision, device and modes of the dense one."""
    first = next(model.parameters())
    slimmed = slimmed.to(first.device)
    dense = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in (*slimmed.named_parameters(), *slimmed.named_buffers()):
        tensor.data = tensor.data.to(dense[name].dtype if name in dense else first.dtype)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in slimmed.named_modules():
        module.training = modes[name]
    return slimmed


def apply_plan(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Give a dense model the shape of a plan, in place, to load the slim model's weights next.

    Raises:
        PlanError: the plan does not fit the model.
    """
    groups = find_groups(model, example)
    plan.check(groups)
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
