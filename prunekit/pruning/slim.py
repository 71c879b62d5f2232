"""Dense model + plan → slim model, with proof."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.plan import Group, Plan
from prunekit.pruning.constants import Constants
from prunekit.pruning.extract import dead_channels, make_plan
from prunekit.pruning.graph import first_line
from prunekit.pruning.groups import find_groups
from prunekit.pruning.proof import Proof, difference, gate_off, proof_inputs, prove
from prunekit.pruning.surgery import Cutter


def slim(
    model: nn.Module,
    plan: Plan,
    example: Tensor,
    *,
    groups: Sequence[Group] | None = None,
    constants: str = "carrier",
) -> tuple[nn.Module, Proof]:
    """Rebuild a model with just the channels that a plan keeps, and prove that nothing else has changed.

    Args:
        model: the dense model; it is left as it is.
        plan: from ``extract``.
        example: a batch of data, (N, C, H, W); the proof runs on it.
        groups: of the model, where they are known already.
        constants: what becomes of the constants that dead channels emit to readers that pad with zeros. "carrier":
            one dead channel of a group is kept to carry them; "fold": they are folded as if nothing padded. Where the
            proof does not hold then, channels are given back, largest constant first, until it does.

    Returns:
        the slim model, in the dense one's precision, on its device and in its mode; and the proof, whose ``plan`` is
        the plan that held.

    Raises:
        PlanError: the plan does not fit the model, or the proof fails.
    """
    groups = find_groups(model, example) if groups is None else groups
    plan.check(list(groups))
    try:
        reference = copy.deepcopy(model).double().cpu().eval()
    except RuntimeError as error:
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); does it hold on to what it computed, as the old "
            "spectral_norm does? Take that out first (torch.nn.utils.remove_spectral_norm)"
        ) from error
    inputs = proof_inputs(reference, example)
    dead = dead_channels(groups, plan)
    attempt = _Attempt(reference, groups, inputs, carry=constants == "carrier")
    rebuilt, proof = attempt.run(dead)
    if not proof.holds:
        rebuilt, proof = attempt.give_back(dead)
    if not proof.holds:
        raise PlanError(f"the slim model is not the dense one with its dead gates at zero: {proof.reason}")
    return _deliver(rebuilt, model, attempt, proof), proof


def apply_plan(model: nn.Module, plan: Plan, example: Tensor) -> nn.Module:
    """Give a dense model the shape that the plan says, in place: for weights that are loaded next.

    Raises:
        PlanError: the plan does not fit the model.
    """
    groups = find_groups(model, example)
    plan.check(groups)
    cutter = Cutter(model, groups)
    dead, removed = cutter.settle(dead_channels(groups, plan))
    if set(removed) != set(plan.removed):
        odd = sorted(set(removed) ^ set(plan.removed))[0]
        raise PlanError(f"the plan's channels and its removed modules disagree about {odd}; extract it again")
    cutter.cut(model, dead, removed)
    for name in plan.added_bias:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise PlanError(f"the plan adds a bias to {name!r}, which is not there; extract it again") from None
        module.bias = nn.Parameter(torch.zeros(module.weight.shape[0], dtype=module.weight.dtype))
    return model


class _Attempt:
    """One model, slimmed by one set of dead channels after another."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], inputs: Sequence[Tensor], carry: bool):
        self.model = model
        self.groups = groups
        self.inputs = inputs
        self.carry = carry
        self.gated = model

    def run(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, Proof]:
        cutter = Cutter(self.model, self.groups)
        dead, _ = cutter.settle(dead)
        self.gated = gate_off(self.model, self.groups, dead)
        rebuilt = copy.deepcopy(self.gated)
        report = Constants(rebuilt, self.groups, dead, self.inputs).fold(self.carry)
        cut = {name: set(channels) - set(report.carriers.get(name, ())) for name, channels in dead.items()}
        plan = make_plan(self.model, self.groups, cut)
        # A carrier keeps its group alive, but not what would have died of the group's death: settle again, with it.
        cut, removed = cutter.settle(cut)
        plan.added_bias = cutter.cut(rebuilt, cut, removed, report.biases)
        plan.carriers = report.carriers
        proof = prove(self.gated, rebuilt, self.inputs)
        proof.folded, proof.carriers = report.folded, sum(map(len, report.carriers.values()))
        proof.plan = plan
        return rebuilt, proof

    def give_back(self, dead: Mapping[str, set[int]]) -> tuple[nn.Module, Proof]:
        """Keep dead channels that cannot be replaced, largest constant first, until the proof holds or none is left."""
        loose = self.inexact(dead)
        # A channel given back lives as it was trained, so more of them can only bring the two closer: search by halves.
        low, high = 0, len(loose)
        while low < high:
            middle = (low + high) // 2
            holds = self.run(_without(dead, loose[:middle]))[1].holds
            low, high = (low, middle) if holds else (middle + 1, high)
        rebuilt, proof = self.run(_without(dead, loose[:low]))
        proof.given_back = low
        return rebuilt, proof

    def inexact(self, dead: Mapping[str, set[int]]) -> list[tuple[float, str, int]]:
        dead, _ = Cutter(self.model, self.groups).settle(dead)
        gated = gate_off(self.model, self.groups, dead)
        return Constants(gated, self.groups, dead, self.inputs).inexact(self.carry)


def _without(dead: Mapping[str, set[int]], given: Sequence[tuple[float, str, int]]) -> dict[str, set[int]]:
    left = {name: set(channels) for name, channels in dead.items()}
    for _, name, channel in given:
        left[name].discard(channel)
    return left


def _deliver(rebuilt: nn.Module, model: nn.Module, attempt: _Attempt, proof: Proof) -> nn.Module:
    """To the dense model's precision, device and modes, with the difference that the rounding makes."""
    first = next(model.parameters())
    single = copy.deepcopy(rebuilt).float()
    proof.float32_diff, _ = difference(attempt.gated.float(), single, [batch.float() for batch in attempt.inputs])
    rebuilt = rebuilt.to(first.device, first.dtype)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in rebuilt.named_modules():
        module.training = modes[name]
    return rebuilt
