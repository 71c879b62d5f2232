"""How much each channel matters: scores by which channels are ranked, and the least of them cut.

"magnitude" and "taylor" give the figures of torch-pruning's ``GroupMagnitudeImportance`` and ``GroupTaylorImportance``
(a test holds them equal where both see the same groups), but read them from our groups: its own dependency graph takes
seconds on densely connected networks, and its importances pass over depthwise kernels, and (Taylor) over norms.

Other than "gate" they choose channels that are alive. The equivalence check compares with the dense model that has their gates at
zero; how far that is from the dense model as it was trained is the drift.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.config.registry import register_importance
from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.parameter_slices import ParameterSlices
from prunekit.pruning.plan import Group
from prunekit.utils.text import plural

# For each batch of training data, the loss of the model that it is called with; the gradient is the caller's business.
Losses = Callable[[nn.Module], Iterable[Tensor]]
Reduction = Literal["mean", "sum", "max"]
Normalizer = Literal["mean", "sum", "max", "none"]


@register_importance("gate")
def gate(model: nn.Module, groups: Sequence[Group], losses: Losses | None = None) -> dict[str, np.ndarray]:
    """The effective gate: how much of a channel its norms leave.

    Raises:
        PlanError: a gate is not finite.
    """
    found = {group.id: gate_scores(model, group) for group in groups if group.reason is None}
    for name, values in found.items():
        if not np.isfinite(values).all():
            group = next(group for group in groups if group.id == name)
            raise PlanError(
                f"a gate of {name} is not finite{_at_fault(model, {gate.norm for gate in group.gates})}, so nothing "
                "can be read from it; train with a lower rate"
            )
    return found


@register_importance("magnitude")
def magnitude(
    model: nn.Module,
    groups: Sequence[Group],
    losses: Losses | None = None,
    p: float = 2,
    reduction: Reduction = "mean",
    normalizer: Normalizer = "mean",
    norms: bool = True,
) -> dict[str, np.ndarray]:
    """The size of a channel's weights (Li et al., ICLR 2017; over groups: Fang et al., CVPR 2023): Σ|w|^p.

    Args:
        model: the model.
        groups: from ``find_groups``.
        losses: not used.
        p: the power.
        reduction: how the slices of a channel (what makes it, what reads it, …) are put together.
        normalizer: what a group's scores are divided by, so that groups can be compared: their own mean, sum or
            largest.
        norms: whether the norms' weights count.

    Raises:
        PlanError: a weight that is not finite, or an option out of range.
    """
    if not p > 0:
        raise PlanError(f"the criterion magnitude needs a p above 0, got {p}; 1 and 2 are usual")
    slices = _slices(model, groups, norms)
    parts = slices.sums(lambda weight: weight.detach().double().abs().pow(p))
    return _normalized(model, slices, groups, _reduced(slices, parts, reduction), normalizer)


@register_importance("taylor")
def taylor(
    model: nn.Module,
    groups: Sequence[Group],
    losses: Losses | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = "mean",
    norms: bool = True,
) -> dict[str, np.ndarray]:
    """What the loss would change by without a channel, to first order (Molchanov et al., CVPR 2019): Σ|w·∂L/∂w|.

    As in torch-pruning the absolute value, where the paper has the square. The mean over the batches of what each
    gives. The model runs in eval mode; it is left in its modes, and no gradient is left in it.

    Args:
        model: the model.
        groups: from ``find_groups``.
        losses: gives the loss for each of a few batches.
        reduction: as for "magnitude".
        normalizer: as for "magnitude".
        norms: whether the norms' weights count.

    Raises:
        PlanError: there are no losses, one is not finite, or an option is out of range.
    """
    if losses is None:
        raise PlanError(
            "the criterion taylor needs gradients, so give it losses: a function that gives, for a model, "
            "its loss on each of a few batches"
        )
    slices = _slices(model, groups, norms)
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter.requires_grad for parameter in slices.tensors]
    found, batches = torch.zeros(0), 0
    try:
        model.eval()
        for parameter in slices.tensors:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for batches, loss in enumerate(losses(model), 1):
                _see(loss, batches)
                gradients = dict(
                    zip(
                        map(id, slices.tensors),
                        torch.autograd.grad(loss, slices.tensors, allow_unused=True, materialize_grads=True),
                        strict=True,
                    )
                )
                parts = slices.sums(lambda weight, g=gradients: (weight.detach() * g[id(weight)]).double().abs())
                one = _reduced(slices, parts, reduction)
                found = one if not len(found) else found + one
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in zip(slices.tensors, wanted, strict=True):
            parameter.requires_grad_(flag)
    if not batches:
        raise PlanError("the criterion taylor got no batch from losses; give it one at least")
    return _normalized(model, slices, groups, found / batches, normalizer)


@register_importance("random")
def random(
    model: nn.Module, groups: Sequence[Group], losses: Losses | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Chance: uniform in [0, 1), the same for a seed and a group in every process."""
    if seed < 0:
        raise PlanError(f"the criterion random needs a seed of at least 0, got {seed}")
    return {
        group.id: np.random.default_rng([seed, zlib.crc32(group.id.encode())]).random(group.channels)
        for group in groups
        if group.reason is None
    }


def _at_fault(model: nn.Module, modules: Iterable[str]) -> str:
    """The first number of these modules that is not finite, in brackets; nothing where all are."""
    for name in sorted(modules):
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            bad = torch.nonzero(~torch.isfinite(tensor.detach()))
            if len(bad):
                return f" ({name}.{key} is {float(tensor[tuple(bad[0])])})"
    return ""


def _see(loss: Tensor, batch: int) -> None:
    if loss.numel() != 1 or not torch.isfinite(loss).all():
        value = f"{loss.item()}" if loss.numel() == 1 else f"of shape {tuple(loss.shape)}"
        raise PlanError(
            f"the criterion taylor needs a loss that is one finite number; that of batch {batch} is {value}"
        )
    if not loss.requires_grad:
        raise PlanError(
            f"the criterion taylor needs a loss with a gradient, and that of batch {batch} has none; "
            "give losses without torch.no_grad() and detach()"
        )


def _slices(model: nn.Module, groups: Sequence[Group], norms: bool) -> ParameterSlices:
    return ParameterSlices(model, [group for group in groups if group.reason is None], norms)


def _reduced(slices: ParameterSlices, parts: Iterable[tuple[Tensor, Tensor]], reduction: Reduction) -> Tensor:
    """Each channel's slices in one figure, (total,)."""
    if reduction not in ("mean", "sum", "max"):
        raise PlanError(f"reduction is mean, sum or max, got {reduction!r}")
    found = torch.zeros(slices.total + 1, dtype=torch.float64)
    for values, owner in parts:
        one = torch.zeros_like(found).index_add_(0, owner.cpu(), values.cpu())
        found = torch.maximum(found, one) if reduction == "max" else found + one
    found = found[: slices.total]
    return found / slices.members if reduction == "mean" else found


def _normalized(
    model: nn.Module, slices: ParameterSlices, groups: Sequence[Group], figures: Tensor, normalizer: Normalizer
) -> dict[str, np.ndarray]:
    by = {"mean": np.mean, "sum": np.sum, "max": np.max, "none": lambda _: 1.0}
    if normalizer not in by:
        raise PlanError(f"normalizer is {', '.join(by)}, got {normalizer!r}")
    found = {}
    for group in groups:
        if group.reason is None:
            values = slices.part(figures, group).numpy()
            if not np.isfinite(values).all():
                fault = _at_fault(model, {member.tensor.rpartition(".")[0] for member in group.members})
                raise PlanError(f"a weight of {group.id} or its gradient is not finite{fault}; train with a lower rate")
            # A group of nothing but zeros is all dead, and stays so.
            found[group.id] = values / (by[normalizer](values) or 1.0)
    return found


def check_finite(model: nn.Module) -> None:
    """Raise PlanError where a parameter or a buffer holds a number that is not finite: nothing can be read from it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        bad = tensor.detach()[~torch.isfinite(tensor.detach())]
        if bad.numel():
            raise PlanError(
                f"{name} is {float(bad.flatten()[0])} in {plural(bad.numel(), 'place')} of {tensor.numel()}, so "
                "nothing can be read from the model; train with a lower rate, or load an earlier state"
            )
