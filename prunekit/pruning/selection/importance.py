"""Importance: scores by which channels are ranked; the lowest are pruned.

"magnitude" and "taylor" equal torch-pruning's ``GroupMagnitudeImportance`` and ``GroupTaylorImportance`` where both see
the same groups, but include depthwise kernels and norms. All but "gate" select live channels: the equivalence check
compares with the dense model with their gates at zero, and the difference from the model as trained is the drift.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.config.registry import register_importance
from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import gate_scores, shrinking_rows
from prunekit.pruning.graph.parameter_slices import ParameterSlices
from prunekit.pruning.plan import Group
from prunekit.utils.copying import kept_modes
from prunekit.utils.text import plural

# Yields the loss of the model it is called with on a few batches of data, with gradients.
Losses = Callable[[nn.Module], Iterable[Tensor]]
Reduction = Literal["mean", "sum", "max"]
Normalizer = Literal["mean", "sum", "max", "none"]


@register_importance("gate")
def gate(model: nn.Module, groups: Sequence[Group], losses: Losses | None = None) -> dict[str, np.ndarray]:
    """Effective gates: |γ|·√(v/(v+ε)) of the last norm of a channel, the largest of its branches.

    Groups without gates have no scores, and keep their channels.
    """
    scores = {}
    for group in _prunable(groups):
        if group.combine is None:
            continue
        scores[group.id] = gate_scores(model, group)
        _check_scores(model, f"a gate of {group.id}", scores[group.id], {gate.norm for gate in group.gates})
    return scores


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
    """Σ|w|^p over a channel's weights (Li et al., ICLR 2017; over groups: Fang et al., CVPR 2023).

    Args:
        p: the power.
        reduction: combines the slices of a channel (its producers, its readers, …).
        normalizer: statistic of a group's scores that divides them, so that groups can be compared.
        norms: whether the norms' weights count.

    Raises:
        PlanError: a weight that is not finite, or an option out of range.
    """
    if not p > 0:
        raise PlanError(f"magnitude: p={p}: must be above 0; 1 and 2 are usual")
    slices = ParameterSlices(model, _prunable(groups), norms)
    sums = slices.sums(lambda weight: weight.detach().to(torch.float64, copy=True).abs_().pow_(p))
    return _normalize(model, slices, groups, _reduce(slices, sums, reduction), normalizer)


@register_importance("taylor")
def taylor(
    model: nn.Module,
    groups: Sequence[Group],
    losses: Losses | None = None,
    reduction: Reduction = "mean",
    normalizer: Normalizer = "mean",
    norms: bool = True,
) -> dict[str, np.ndarray]:
    """Σ|w·∂L/∂w|, the first-order change of the loss without a channel (Molchanov et al., CVPR 2019).

    The absolute value as in torch-pruning, where the paper squares; the mean over the batches. The model runs in eval
    mode; its modes and gradients are left as they were.

    Args:
        losses: yields the loss of the model on a few batches.
        reduction, normalizer, norms: as for "magnitude".

    Raises:
        PlanError: there are no losses, one is not finite, or an option is out of range.
    """
    if losses is None:
        raise PlanError("taylor needs losses: pass a function that yields the model's loss on each of a few batches")
    slices = ParameterSlices(model, _prunable(groups), norms)
    required_grad = [parameter.requires_grad for parameter in slices.tensors]
    scores, batches = torch.zeros(slices.total, dtype=torch.float64), 0
    with kept_modes(model), torch.enable_grad():
        try:
            model.eval()
            for parameter in slices.tensors:
                parameter.requires_grad_(True)
            for batches, loss in enumerate(losses(model), 1):
                _check_loss(loss, batches)
                gradients = torch.autograd.grad(loss, slices.tensors, allow_unused=True, materialize_grads=True)
                by_id = dict(zip(map(id, slices.tensors), gradients, strict=True))
                sums = slices.sums(lambda weight, g=by_id: (weight.detach() * g[id(weight)]).double().abs())  # type: ignore[misc]
                scores = scores + _reduce(slices, sums, reduction)
        finally:
            for parameter, flag in zip(slices.tensors, required_grad, strict=True):
                parameter.requires_grad_(flag)
    if not batches:
        raise PlanError("taylor got no batch from losses; yield the loss of at least one")
    return _normalize(model, slices, groups, scores / batches, normalizer)


@register_importance("ablation")
def ablation(
    model: nn.Module,
    groups: Sequence[Group],
    losses: Losses | None = None,
    power: float = 2,
    floor: float = 0.05,
    batches: int = 4,
) -> dict[str, np.ndarray]:
    """The measured change of the loss without a whole group, divided among its channels.

    The k least important of a group's n channels have the share (k ÷ n)^power of it together; they are ranked by their
    gates, or without gates by the size of their weights. Where whole branches go, sums of first-order changes say
    little: most of a layer's channels can go at a small loss, all of them often cannot. The model runs in eval mode and
    is left as it was.

    Args:
        losses: yields the loss of the model on a few batches.
        power: at least 1.
        floor: the least that a group counts, as a share of what the most important one does.
        batches: how many of the losses are used.

    Raises:
        PlanError: there are no losses, one is not finite, or an option is out of range.
    """
    if losses is None:
        raise PlanError("ablation needs losses: pass a function that yields the model's loss on each of a few batches")
    if not power >= 1 or not 0 <= floor <= 1 or batches < 1:
        raise PlanError(
            f"ablation: power={power:g}, floor={floor:g}, batches={batches}: must be power >= 1, "
            "0 <= floor <= 1 and batches >= 1"
        )
    free = _prunable(groups)

    def loss() -> float:
        values = [float(value) for value in islice(losses(model), batches)]
        if not values or not np.isfinite(values).all():
            raise PlanError(f"ablation needs finite losses; got {values or 'none'}")
        return float(np.mean(values))

    changes = {}
    with kept_modes(model), torch.no_grad():
        model.eval()
        whole = loss()
        for group in free:
            rows = list(shrinking_rows(model, group))
            saved = [one.parameter.clone() for one in rows]
            for one in rows:
                one.parameter.index_fill_(one.axis, one.of(np.arange(group.channels)), 0.0)
            try:
                changes[group.id] = loss() - whole
            finally:
                for one, values in zip(rows, saved, strict=True):
                    one.parameter.copy_(values)
    least = floor * max([0.0, *changes.values()])
    ranked = {**magnitude(model, groups), **gate(model, groups)}
    scores = {}
    for group in free:
        shares = np.diff(np.linspace(0, 1, group.channels + 1) ** power)
        scores[group.id] = max(changes[group.id], least) * shares[ranked[group.id].argsort(kind="stable").argsort()]
    return scores


@register_importance("random")
def random(
    model: nn.Module, groups: Sequence[Group], losses: Losses | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Uniform in [0, 1), the same for a seed and a group in every process."""
    if seed < 0:
        raise PlanError(f"random: seed={seed}: must be at least 0")
    return {
        group.id: np.random.default_rng([seed, zlib.crc32(group.id.encode())]).random(group.channels)
        for group in _prunable(groups)
    }


def check_finite(model: nn.Module) -> None:
    """Raise PlanError where a parameter or a buffer has an entry that is not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # Sums show what is not finite, in a fraction of the time; they may also overflow.
        if not tensor.is_floating_point() or torch.isfinite(tensor.detach().sum()):
            continue
        bad = tensor.detach()[~torch.isfinite(tensor.detach())]
        if bad.numel():
            raise PlanError(
                f"{name} is {float(bad.flatten()[0])} in {plural(bad.numel(), 'place')} of {tensor.numel()}; train "
                "with a lower learning rate, or load an earlier state"
            )


def _prunable(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.reason is None]


def _check_scores(model: nn.Module, what: str, scores: np.ndarray, modules: Iterable[str]) -> None:
    """Raise PlanError, which names the first bad entry of these modules, where a score is not finite."""
    if np.isfinite(scores).all():
        return
    states = {name: model.get_submodule(name).state_dict() for name in sorted(modules)}
    tensors = {f"{name}.{key}": tensor for name, state in states.items() for key, tensor in state.items()}
    bad = (f" ({name} is {float(x[~torch.isfinite(x)][0])})" for name, x in tensors.items() if not x.isfinite().all())
    raise PlanError(f"{what} is not finite{next(bad, '')}; train with a lower learning rate")


def _check_loss(loss: Tensor, batch: int) -> None:
    if loss.numel() != 1 or not torch.isfinite(loss).all():
        value = f"{loss.item()}" if loss.numel() == 1 else f"of shape {tuple(loss.shape)}"
        raise PlanError(f"taylor needs a loss that is one finite number; that of batch {batch} is {value}")
    if not loss.requires_grad:
        raise PlanError(
            f"taylor needs a loss with a gradient, and that of batch {batch} has none; compute it without "
            "torch.no_grad() and detach()"
        )


def _reduce(slices: ParameterSlices, sums: Iterable[tuple[Tensor, Tensor]], reduction: Reduction) -> Tensor:
    """Combine each channel's slices into one score, (total,)."""
    if reduction not in ("mean", "sum", "max"):
        raise PlanError(f"reduction={reduction!r}: must be mean, sum or max")
    scores = torch.zeros(slices.total + 1, dtype=torch.float64)
    for values, owner in sums:
        of_slice = torch.zeros_like(scores).index_add_(0, owner.cpu(), values.cpu())
        scores = torch.maximum(scores, of_slice) if reduction == "max" else scores + of_slice
    scores = scores[: slices.total]
    return scores / slices.members if reduction == "mean" else scores


def _normalize(
    model: nn.Module, slices: ParameterSlices, groups: Sequence[Group], scores: Tensor, normalizer: Normalizer
) -> dict[str, np.ndarray]:
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "mean": np.mean, "sum": np.sum, "max": np.max, "none": lambda _: 1.0
    }  # fmt: skip
    if normalizer not in statistics:
        raise PlanError(f"normalizer={normalizer!r}: must be one of {', '.join(statistics)}")
    normalized = {}
    for group in _prunable(groups):
        values = slices.part(scores, group).numpy()
        _check_scores(model, f"a weight of {group.id} or its gradient", values, {m.module for m in group.members})
        # The scores of a group of zeros stay zero.
        normalized[group.id] = values / (statistics[normalizer](values) or 1.0)
    return normalized
