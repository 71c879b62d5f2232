"""Rebuilding a dense model with the channels that a plan keeps, and checking that the result is equivalent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.axes import output_axis
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.liveness import dead_layers
from prunekit.pruning.graph.silence import silence
from prunekit.pruning.graph.slicing import channel_index
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.provenance import record_plan
from prunekit.pruning.surgery.constant_folding import measure_constants
from prunekit.pruning.surgery.copies import clone, convert, copy_as, drop_caches, transfer
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.equivalence import (
    DEAD,
    SENSITIVE,
    EquivalenceReport,
    check_all,
    check_equivalence,
    check_inputs,
    check_repeatable,
    check_sizes,
    compared_inputs,
    noise_batch,
    output_difference,
    outputs_of,
    values_of_one,
)
from prunekit.pruning.surgery.exact import ExactSlimming
from prunekit.pruning.surgery.masked_statistics import mask_statistics
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.rebuild import mask_responses, rebuild
from prunekit.pruning.surgery.training_check import check_training
from prunekit.utils.compiled import unwrap
from prunekit.utils.inputs import Example, as_example, cast, first_inputs
from prunekit.utils.text import first_line, join_names, plural

MANY = 100_000  # values of an image
FINE_DRIFT = 1e-3  # a smaller drift, relative to the output, is measured in float64


def slim(
    model: nn.Module,
    plan: Plan,
    example: Example,
    *,
    groups: Sequence[Group] | None = None,
    exact: bool = False,
    noise: int | None = None,
    sizes: Sequence[tuple[int, ...]] | None = None,
    thorough: bool = True,
) -> tuple[nn.Module, EquivalenceReport]:
    """Rebuild a model with only the channels that a plan keeps, and check the result.

    What the readers of a cut channel see is replaced by its mean over the data, which is folded into the norm after the
    reader or into a bias (mean replacement, Evci et al., 2018). The check compares with the dense model in which the
    same inputs are replaced, and the report states the drift: the difference from the dense model as given.

    Args:
        model: the dense model; it is left unchanged.
        plan: from ``extract``.
        example: a batch of data, as for ``find_groups``, for the means and the equivalence check.
        groups: of the model, if already known.
        exact: compare with the dense model with its dead gates at zero, and keep channels until both are equal: those
            that do not emit a constant (largest first), and a carrier of the constants where a reader pads with zeros.
        noise: number of noise images in the check besides the data, at least 2; by default 16 with
            ``exact``, else 4, or 2 where the model takes large images only.
        sizes: of the images on which both models are compared (``check_sizes``), if already known.
        thorough: whether these show all that the model does at any size, such as a padding of odd maps; else two sizes
            of them that show most.

    Returns:
        The slim model, in the dense model's precision, device, memory format and mode, and the report of the
        equivalence check. Its ``plan``, not the plan of ``extract``, is that of the slim model, since it names the
        biases that were added and, with ``exact``, has the channels that were given back; ``save`` stores both
        together. For the optimizer see ``slim_optimizer``.

    Raises:
        PlanError: the plan does not fit the model, the equivalence check fails, or the slim model cannot be trained.
    """
    model = unwrap(model)
    example = as_example(example)
    groups = find_groups(model, example) if groups is None else groups
    plan.check(list(groups))
    reference = copy_as(model, torch.float64)
    sizes = check_sizes(reference, example, thorough) if sizes is None else sizes
    inputs = check_inputs(reference if exact else None, example, sizes)
    dead = dead_channels(groups, plan)
    if exact:
        _check_runs(reference, inputs[0])
        noises = noise_batch(reference, inputs[0], noise or 16)
        attempt = ExactSlimming(reference, groups, inputs, [] if noises is None else [noises])
        slimmed, report = attempt.run(dead)
        masked, outputs, replaced = attempt.reference, outputs_of(reference, inputs[0]), "its dead gates at zero"
    else:
        compared = compared_inputs(inputs, sizes)
        large = values_of_one(compared[0]) > MANY
        noises = noise_batch(None, compared[0], noise or (2 if large else 4))
        try:
            slimmed, masked, outputs, report = _replace_by_means(
                model, reference, groups, dead, inputs, compared, noises
            )
        except Exception:
            _check_runs(copy_as(model, torch.float64), first_inputs(compared[0], 1))
            raise
        replaced = "the same inputs replaced by their means"
    if not report.passed:
        _check_runs(copy_as(model, torch.float64), inputs[0] if exact else first_inputs(compared[0], 1))
        raise PlanError(
            f"the slim model is not equivalent to the dense model with {replaced}: {report.reason}"
            + (_dead_network_hint(copy_as(model, torch.float64), groups, inputs) if report.reason == DEAD else "")
        )
    # The plan is applied to a fresh copy: the checked one may have kept something of the check, such as a cache.
    result = _shape_like(drop_caches(clone(model)), groups, report.plan)
    transfer(slimmed, result)
    checked = copy_as(result, torch.float32)
    compared = compared_inputs(inputs, ()) if exact else compared
    first = cast(first_inputs(compared[0], 1), torch.float32)
    expected = outputs_of(convert(masked, torch.float32), first)
    report.float32_diff, _ = output_difference(expected, check_repeatable(checked, first))
    _measure_drift(report, model, slimmed, checked, outputs, inputs[0])
    check_training(model, checked, [first_inputs(compared[0], 2), first_inputs(inputs[0], 2)])
    report.plan.notes = [*plan.notes, *_notes(groups, plan, report)]
    record_plan(result, model, report.plan, example)
    return result, report


def _replace_by_means(
    model: nn.Module,
    reference: nn.Module,
    groups: Sequence[Group],
    dead: Mapping[str, set[int]],
    inputs: Sequence[Example],
    compared: Sequence[Example],
    noise: Example | None,
) -> tuple[nn.Module, nn.Module, list[Tensor], EquivalenceReport]:
    """Return the slim model, which is ``reference`` from then on, the masked dense model, the outputs of the model as
    given on the data, and the comparison."""
    data = inputs[0]
    dead, removed = Cutter(reference, groups).complete(dead)
    # The means are those of the model as it is used: in float32 they take a third of the time.
    source = reference if next(model.parameters()).dtype == torch.float64 else copy_as(model, torch.float32)
    outputs = None
    if zeroed := [group for group in groups if group.zeroed and dead.get(group.id)]:
        outputs = outputs_of(source, data)
        for silenced in {source, reference}:
            for group in zeroed:
                silence(silenced, group, channel_index(dead[group.id]))
    constants = measure_constants(reference, groups, dead, [data], source=source, ranges=False)
    masked = mask_statistics(mask_responses(reference, groups, dead, constants, removed), groups, dead)
    plan, folding = rebuild(reference, groups, dead, constants)
    report = check_all(masked, reference, compared, [] if noise is None else [noise])
    if report.reason is not None and any(what in report.reason for what in (DEAD, SENSITIVE)):
        # Few images may happen to give the same output, or all be too sensitive.
        noise = noise_batch(masked, data, 16)
        report = check_all(masked, reference, inputs, [] if noise is None else [noise])
    report.folded, report.plan = folding.folded, plan
    return reference, masked, outputs or constants.outputs, report


def _measure_drift(
    report: EquivalenceReport,
    model: nn.Module,
    slimmed: nn.Module,
    checked: nn.Module,
    outputs: list[Tensor],
    data: Example,
) -> None:
    """Measure the drift in the precision of the dense model's outputs, and in float64 where that rounds too much."""
    fine = outputs[0].dtype == torch.float64
    report.measure_drift(outputs, outputs_of(slimmed if fine else checked, data))
    if not fine and report.drift < FINE_DRIFT * max(report.output_size, 1):
        report.measure_drift(outputs_of(copy_as(model, torch.float64), data), outputs_of(slimmed, data))


def _check_runs(model: nn.Module, batch: Example) -> None:
    try:
        check_repeatable(model, batch)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"the equivalence check runs a copy of the model in float64 on the CPU, and that fails: "
            f"{first_line(error)}; if the model creates tensors of a fixed dtype or device, take both from its input"
        ) from error


def _dead_network_hint(model: nn.Module, groups: Sequence[Group], inputs: Sequence[Example]) -> str:
    if layers := dead_layers(model, groups):
        return f", every gate of {join_names(layers)} is zero; train with a lower decay.weight"
    if check_equivalence(model, model, inputs).reason == DEAD:
        return ", already before pruning; train it first, or pass real images as the example"
    return "; prune fewer channels, or train with a lower rate or decay.weight"


def _notes(groups: Sequence[Group], plan: Plan, report: EquivalenceReport) -> list[str]:
    """Notes on channels that are kept because they cannot be replaced."""
    notes = []
    largest = sorted(report.inexact.items(), key=lambda item: -item[1])
    names = ", ".join(f"{name} by up to {size:.2g}" for name, size in largest[:3])
    names += f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    if report.given_back:
        shifts = f"; their constants would move {names}" if largest else ""
        notes.append(f"{report.given_back} dead channels stay, since cutting them would change the output{shifts}")
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


def apply_plan(model: nn.Module, plan: Plan, example: Example, groups: Sequence[Group] | None = None) -> nn.Module:
    """Give a dense model the shape of a plan, in place, to load the slim model's weights next.

    The plan is that of the check (``EquivalenceReport.plan``); groups are those of the model, if already known.
    ``save`` and ``load`` do both steps at once.

    Raises:
        PlanError: the plan does not fit the model.
    """
    model = unwrap(model)
    groups = find_groups(model, example) if groups is None else groups
    plan.check(list(groups))
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
