"""Dense model + plan → slim model, with an equivalence check."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.axes import output_axis
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.liveness import dead_layers
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.provenance import record_plan
from prunekit.pruning.surgery.constant_folding import ConstantFolder, FoldingReport
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
from prunekit.pruning.surgery.make_plan import dead_channels, plan_from_dead
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
    """Rebuild a model with just the channels that a plan keeps, and prove that nothing else has changed.

    Args:
        model: the dense model; it is left as it is.
        plan: from ``extract``.
        example: a batch of data, (N, C, H, W); the equivalence check runs on it.
        groups: of the model, where they are known already.
        constants: what becomes of the constants that dead channels emit. "carrier": they are folded into what reads
            them, and where that pads with zeros one dead channel of a group is kept to carry them; "fold": they are
            folded as if nothing padded; "keep": a channel that emits anything but zero is kept. Where the equivalence check does
            not hold then, channels are given back, largest constant first, until it does. "drop": they are cut with
            their channels, as other tools do; the equivalence check says what that has changed and need not hold.
        noise: how many images of noise the equivalence check looks at beside the data, at least 2.

    Returns:
        the slim model, in the dense one's precision, on its device and in its mode; and the equivalence check, whose ``plan`` is
        the plan that held. An optimiser of the dense model knows nothing of it: make a new one of its parameters.

    Raises:
        PlanError: the plan does not fit the model, or the equivalence check fails.
    """
    if constants not in CONSTANTS:
        raise PlanError(f"constants is {constants!r}; there are {', '.join(CONSTANTS)}")
    groups = find_groups(model, example) if groups is None else groups
    plan.check(list(groups))
    try:
        reference = copy.deepcopy(model).double().cpu().eval()
    except RuntimeError as error:
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); does it hold on to what it computed, as the old "
            "spectral_norm does? Take that out first (torch.nn.utils.remove_spectral_norm)"
        ) from error
    inputs = check_inputs(reference, example)
    attempt = _Attempt(reference, groups, inputs, _noise(reference, inputs, noise), constants)
    dead = attempt.start(dead_channels(groups, plan))
    rebuilt, equivalence = attempt.run(dead)
    if not equivalence.passed and constants != "drop":
        rebuilt, equivalence = attempt.give_back(dead)
    if not equivalence.passed and not (constants == "drop" and math.isfinite(equivalence.max_abs_diff)):
        where = ""
        if equivalence.reason == DEAD:
            layers = dead_layers(model, groups)
            where = (
                f", every gate of {join_names(layers)} is zero; train with a lower decay.weight"
                if layers
                else "; lower slim.threshold, or train with a lower rate or decay.weight"
            )
        raise PlanError(f"the slim model is not the dense one with its dead gates at zero: {equivalence.reason}{where}")
    equivalence.plan.notes = [*plan.notes, *_given(equivalence)]
    slim_model = _deliver(rebuilt, model, attempt, equivalence)
    record_plan(slim_model, model, equivalence.plan, example.shape[1:])
    return slim_model, equivalence


def rebuild(
    gated: nn.Module,
    groups: Sequence[Group],
    dead: Mapping[str, set[int]],
    inputs: Sequence[Tensor],
    constants: str = "carrier",
) -> tuple[Plan, FoldingReport]:
    """Cut dead channels out of a model in place, their constants replaced, without an equivalence check.

    Args:
        gated: in eval mode, the gates of the dead channels at zero (``gate_off``); it becomes the slim model.
        groups: of it.
        dead: by group, from ``Cutter.complete``.
        inputs: batches on which the constants are measured, in the model's precision. What is the same in all of them
            counts as constant, so their maps should have a border and an inside, and their images should differ.
        constants: "carrier", "fold" or "drop", as for ``slim``.

    Raises:
        PlanError: nothing would be left of a module that the model cannot do without.
    """
    measured, cutter = ConstantFolder(gated, groups, dead, inputs), Cutter(gated, groups)
    if constants == "drop":
        report = FoldingReport(inexact=measured.losses(carried=False, dropped=True))
    else:
        report = measured.fold(constants == "carrier")
    cut = {name: set(channels) - set(report.carriers.get(name, ())) for name, channels in dead.items()}
    # A carrier keeps its group alive, but not what would have died of the group's death, nor the balance of groups.
    settled, removed = cutter.complete(cut)
    if constants != "drop":
        measured.silence({name: channels - settled[name] for name, channels in cut.items()})
    plan = plan_from_dead(gated, groups, settled, removed)
    plan.added_bias = cutter.cut(gated, settled, removed, report.biases)
    report.lost = set(report.biases) - set(plan.added_bias)
    plan.carriers = report.carriers
    return plan, report


def apply_plan(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Give a dense model the shape that the plan says, in place: for weights that are loaded next.

    Raises:
        PlanError: the plan does not fit the model.
    """
    groups = find_groups(model, example)
    plan.check(groups)
    cutter = Cutter(model, groups)
    dead, removed = cutter.complete(dead_channels(groups, plan))
    if set(removed) != set(plan.removed):
        odd = sorted(set(removed) ^ set(plan.removed))[0]
        raise PlanError(f"the plan's channels and its removed modules disagree about {odd}; extract it again")
    cutter.cut(model, dead, removed)
    for name in plan.added_bias:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise PlanError(f"the plan adds a bias to {name!r}, which is not there; extract it again") from None
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise PlanError(f"the plan adds a bias to {name!r}, which has no weight; extract it again")
        module.bias = nn.Parameter(module.weight.detach().new_zeros(module.weight.shape[output_axis(module)]))
    return model


def _noise(model: nn.Module, inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """A batch beyond the data, where the model makes something finite of it.

    Raises:
        PlanError: a copy of the model in float64 on the CPU fails on the data.
    """
    try:
        with torch.inference_mode():
            model(inputs[0])
    except Exception as error:
        raise PlanError(
            f"the equivalence check runs a copy of the model in float64 on the CPU, and that fails: {first_line(error)}; does "
            "it make tensors of a fixed dtype or device, or call itself by another name? Take both from its input"
        ) from error
    noise = noise_batch(model, inputs[0], count)
    return [] if noise is None else [noise]


class _Attempt:
    """One model, slimmed by one set of dead channels after another."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        inputs: Sequence[Tensor],
        noise: Sequence[Tensor],
        constants: str,
    ):
        self.model = model
        self.groups = groups
        self.inputs = inputs
        self.noise = noise
        self.constants = constants
        self.carry = constants == "carrier"
        self.gated = model
        self.kept = 0
        self.lost: set[str] = set()

    def start(self, dead: Mapping[str, set[int]]) -> dict[str, set[int]]:
        """The channels to cut first: the dead ones, but (with "keep") those that emit something."""
        dead, _ = Cutter(self.model, self.groups).complete(dead)
        if self.constants == "keep":
            speaking = self._measured(dead).speaking()
            self.kept = len(speaking)
            dead = _without(dead, speaking)
        return dead

    def run(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        dead, _ = Cutter(self.model, self.groups).complete(dead)
        self.gated = zero_dead_gates(self.model, self.groups, dead)
        rebuilt = copy.deepcopy(self.gated)
        plan, report = rebuild(rebuilt, self.groups, dead, [*self.inputs, *self.noise], self.constants)
        self.lost |= report.lost
        equivalence = check_equivalence(self.gated, rebuilt, self.inputs)
        for batch in self.noise if equivalence.passed else ():
            # With a tolerance of its own: its outputs may be louder than those of any data.
            other = check_equivalence(self.gated, rebuilt, [batch])
            if not other.max_abs_diff <= other.tolerance:
                equivalence.passed, equivalence.reason = False, f"on noise {other.reason}"
        equivalence.folded, equivalence.carriers = report.folded, sum(map(len, report.carriers.values()))
        equivalence.inexact, equivalence.given_back = report.inexact, self.kept
        equivalence.plan = plan
        return rebuilt, equivalence

    def give_back(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, EquivalenceReport]:
        """Keep dead channels that cannot be replaced, largest constant first, until the equivalence check passes or none is left."""
        measured = self._measured(dead)
        loose = measured.inexact(self.carry, self.lost)
        # A channel given back lives as it was trained, so more of them can only bring the two closer: search by halves.
        low, high = 0, len(loose)
        while low < high:
            middle = (low + high) // 2
            holds = self.run(_without(dead, loose[:middle]))[1].passed
            low, high = (low, middle) if holds else (middle + 1, high)
        rebuilt, equivalence = self.run(_without(dead, loose[:low]))
        equivalence.given_back += low
        equivalence.inexact = measured.losses(self.carry)
        return rebuilt, equivalence

    def _measured(self, dead: Mapping[str, set[int]]) -> ConstantFolder:
        dead, _ = Cutter(self.model, self.groups).complete(dead)
        return ConstantFolder(
            zero_dead_gates(self.model, self.groups, dead), self.groups, dead, [*self.inputs, *self.noise]
        )


def _given(equivalence: EquivalenceReport) -> list[str]:
    """What the equivalence check has to say of channels that were to go and stay, or went and are missed."""
    if not equivalence.inexact and not equivalence.given_back:
        return []
    worst = sorted(equivalence.inexact.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} by up to {size:.2g}" for name, size in worst[:3])
    more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
    lost = f"; their constants would move {named}{more}" if worst else ""
    if equivalence.given_back:
        return [f"{equivalence.given_back} dead channels stay, since cutting them would change the output{lost}"]
    return [f"constants are dropped, which moves {named}{more}"]


def _without(dead: Mapping[str, set[int]], given: Sequence[tuple[float, str, int]]) -> dict[str, set[int]]:
    left = {name: set(channels) for name, channels in dead.items()}
    for _, name, channel in given:
        left[name].discard(channel)
    return left


def _deliver(rebuilt: nn.Module, model: nn.Module, attempt: _Attempt, equivalence: EquivalenceReport) -> nn.Module:
    """To the dense model's precision, device and modes, with the difference that the rounding makes."""
    first = next(model.parameters())
    single = copy.deepcopy(rebuilt).float()
    equivalence.float32_diff, _ = output_difference(
        attempt.gated.float(), single, [batch.float() for batch in attempt.inputs]
    )
    rebuilt = rebuilt.to(first.device)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in (*rebuilt.named_parameters(), *rebuilt.named_buffers()):
        tensor.data = tensor.data.to(held[name].dtype if name in held else first.dtype)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in rebuilt.named_modules():
        module.training = modes[name]
    return rebuilt
