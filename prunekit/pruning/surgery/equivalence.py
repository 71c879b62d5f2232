"""The equivalence check: that a slim model computes what the dense one does with its dead gates at zero.

In float64 on the CPU, on data, at two sizes: max|a − b| ≤ 1e-6 · max(1, max|a|); the same on noise, with a scale of its
own. In float32 the two differ by rounding alone, which is measured beside it. A network that is dead agrees with
everything, so an output that is not finite, or that differs from input to input by no more than the two models may,
proves nothing and fails. (Not to the bit: the images of a batch are not all computed in the same order.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.pruning.graph.gate_expr import zeroing_masks
from prunekit.pruning.graph.trace import tensors_in
from prunekit.pruning.plan import Group, Plan
from prunekit.utils.text import first_line

TOLERANCE = 1e-6
DEAD = "the output is the same for every input: the network is dead"


@dataclass
class EquivalenceReport:
    """The measured difference between the slim model and the dense one with its dead gates at zero.

    Attributes:
        max_abs_diff: in float64, over all inputs and outputs.
        tolerance: what it may be, 1e-6 · max(1, max|dense|).
        inputs: shapes of the inputs.
        float32_diff: the same difference in float32.
        passed: whether the equivalence check passes; ``reason`` says why not.
        given_back: dead channels that had to be kept, because cutting them changes the output.
        folded: dead channels whose constants were folded.
        carriers: dead channels kept as constants.
        inexact: for each module at which cutting would lose something (and channels were given back for that, or
            constants dropped), the most that its output would move by it.
        plan: the plan that held.
    """

    max_abs_diff: float
    tolerance: float
    inputs: list[list[int]]
    float32_diff: float = float("nan")
    passed: bool = False
    reason: str | None = None
    given_back: int = 0
    folded: int = 0
    carriers: int = 0
    inexact: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["plan"]
        return {key: value for key, value in data.items() if value is not None and value == value and value != {}}


def zero_dead_gates(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> nn.Module:
    """A copy of the model, in eval mode, with the gates of these channels at zero: in a row of gates the last one,
    where none is zero already (so that a model whose dead gates are zero is its own copy)."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for group in groups:
            if not dead.get(group.id):
                continue
            for gate, mask in zip(group.gates, zeroing_masks(model, group, dead[group.id]), strict=True):
                weight = copied.get_submodule(gate.norm).weight
                weight[slice(*gate.slice)][torch.from_numpy(mask).to(weight.device)] = 0
    return copied


def check_inputs(model: nn.Module, example: Tensor, limit: int = 8) -> list[Tensor]:
    """Two batches in float64 on the CPU: of the data, and of another size with odd sides where the model takes one."""
    data = example.detach()[:limit].double().cpu()
    if len(data) == 1:
        # Something to vary against.
        data = torch.cat([data, 0.5 * data.flip(-1)])
    inputs = [data]
    if data.dim() == 4:
        other = F.interpolate(
            data, size=[side + side // 4 + 1 - side // 4 % 2 for side in data.shape[2:]], mode="bilinear"
        )
        try:
            with torch.inference_mode():
                model(other.to(next(model.parameters()).dtype))
            inputs.append(other)
        except Exception:
            pass  # A model of one size only: the shapes in the equivalence check say so.
    return inputs


def noise_batch(model: nn.Module, batch: Tensor, count: int = 16, side: int = 64) -> Tensor | None:
    """Noise, from much weaker to much louder than a batch: what is so on the data alone (attention that is shut on all
    of them, maps too small to have an inside) shows on it. ``count`` images of 64×64, or of the batch's size where the
    model takes no other; None where it makes nothing finite of them."""
    generator = torch.Generator().manual_seed(0)
    ones = [1] * (batch.dim() - 2)
    loud = torch.logspace(-1, 1.5, count, dtype=torch.float64).view(-1, 1, *ones) * float(batch.double().std())
    for places in dict.fromkeys([(side,) * len(ones), tuple(batch.shape[2:])]):
        noise = torch.randn(count, batch.shape[1], *places, generator=generator, dtype=torch.float64)
        noise += torch.randn(count, batch.shape[1], *ones, generator=generator, dtype=torch.float64)
        noise = (noise * loud).to(batch)
        try:
            with torch.inference_mode():
                finite = all(torch.isfinite(tensor).all() for tensor in _outputs(model, noise))
        except Exception:
            continue  # A model of one size only.
        return noise if finite else None
    return None


@torch.inference_mode()
def check_equivalence(gated: nn.Module, slim: nn.Module, inputs: Sequence[Tensor]) -> EquivalenceReport:
    """Compare two models in float64 (both must be in it) and eval mode.

    Each output of a model with several has a tolerance of its own; the equivalence check tells of the one that comes closest to it.
    """
    # Of each output: how far the two lie apart, how large it is, and how much it changes from input to input.
    gaps: dict[int, tuple[float, float, float]] = {}
    finite = True
    for batch in inputs:
        dense = _outputs(gated, batch)
        try:
            made = _outputs(slim, batch)
        except Exception as error:
            why = f"it fails on an input of shape {tuple(batch.shape)}: {first_line(error)}"
            return EquivalenceReport(float("inf"), TOLERANCE, _shapes(inputs), reason=why)
        for place, (a, b) in enumerate(zip(dense, made, strict=True)):
            worst, scale, spread = gaps.get(place, (0.0, 1.0, 0.0))
            finite &= bool(torch.isfinite(a).all() and torch.isfinite(b).all())
            if a.shape != b.shape:
                return EquivalenceReport(
                    float("inf"), TOLERANCE, _shapes(inputs), reason=f"output {tuple(b.shape)}, not {tuple(a.shape)}"
                )
            if a.dim() > 0 and len(a) > 1:
                spread = max(spread, float((a[1:] - a[:1]).abs().max()))
            gaps[place] = max(worst, float((a - b).abs().max())), max(scale, float(a.abs().max())), spread
    worst, scale, _ = max(gaps.values(), key=lambda gap: gap[0] / gap[1])
    equivalence = EquivalenceReport(worst, TOLERANCE * scale, _shapes(inputs))
    if not finite:
        equivalence.reason = "an output is not finite"
    elif not any(spread > TOLERANCE * scale for _, scale, spread in gaps.values()):
        equivalence.reason = DEAD
    elif not worst <= equivalence.tolerance:
        equivalence.reason = f"the outputs differ by {worst:.2g}, more than {equivalence.tolerance:.2g}"
    equivalence.passed = equivalence.reason is None
    return equivalence


@torch.inference_mode()
def output_difference(a: nn.Module, b: nn.Module, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Largest and mean absolute difference between two models' outputs, in their own precision."""
    largest, total, count = 0.0, 0.0, 0
    for batch in inputs:
        for x, y in zip(_outputs(a, batch), _outputs(b, batch), strict=True):
            gap = (x.double() - y.double()).abs()
            largest, total, count = max(largest, float(gap.max())), total + float(gap.sum()), count + gap.numel()
    return largest, total / max(count, 1)


def _outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    first = next(model.parameters())
    found = tensors_in(model(batch.to(first.device, first.dtype)))
    return [tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in found if tensor.numel()]


def _shapes(inputs: Sequence[Tensor]) -> list[list[int]]:
    return [list(batch.shape) for batch in inputs]
