"""The equivalence check: a slim model is compared with the dense model whose dead gates are zero.

Both run in float64 on the CPU, on data at two sizes and on noise; they pass if max|a − b| ≤ 1e-6 · max(1, max|a|). An
output that is not finite, or that hardly changes from input to input, fails, because the comparison says nothing.
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
    """The measured difference between the slim model and the dense one with its dead gates at zero."""

    max_abs_diff: float  # in float64, over all inputs and outputs
    tolerance: float  # its limit, 1e-6 · max(1, max|dense|)
    inputs: list[list[int]]  # their shapes
    float32_diff: float = float("nan")  # the same difference in float32
    passed: bool = False
    reason: str | None = None  # why it does not pass
    given_back: int = 0  # dead channels that are kept because cutting them changes the output
    folded: int = 0  # dead channels whose constants are folded
    carriers: int = 0  # dead channels kept as constants
    # For each module whose constants are not replaced (channels are given back for that, or constants dropped), how far
    # its output would move.
    inexact: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = field(default=None, repr=False)  # of the slim model

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["plan"]
        return {key: value for key, value in data.items() if value is not None and value == value and value != {}}


def zero_dead_gates(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a copy of a model in eval mode whose dead channels have a gate of zero (see ``zeroing_masks``)."""
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
    """Return two batches in float64 on the CPU: the data, and the data at another, odd size if the model accepts it."""
    data = example.detach()[:limit].double().cpu()
    if len(data) == 1:
        # A second, different input.
        data = torch.cat([data, 0.5 * data.flip(-1)])
    if data.dim() != 4:
        return [data]
    size = [side + side // 4 + 1 - side // 4 % 2 for side in data.shape[2:]]
    resized = F.interpolate(data, size=size, mode="bilinear")
    try:
        with torch.inference_mode():
            model(resized.to(next(model.parameters()).dtype))
    except Exception:
        return [data]  # A model of one size only; the shapes in the report show it.
    return [data, resized]


def noise_batch(model: nn.Module, batch: Tensor, count: int = 16, side: int = 64) -> Tensor | None:
    """Return noise of 0.1 to 30 times the amplitude of a batch, to find what holds on the data by chance.

    It has ``count`` images of size ``side``, or of the batch's size where the model accepts no other. None where the
    model's output is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    ones = [1] * (batch.dim() - 2)
    amplitude = torch.logspace(-1, 1.5, count, dtype=torch.float64).view(-1, 1, *ones) * float(batch.double().std())
    for size in dict.fromkeys([(side,) * len(ones), tuple(batch.shape[2:])]):
        noise = torch.randn(count, batch.shape[1], *size, generator=generator, dtype=torch.float64)
        noise += torch.randn(count, batch.shape[1], *ones, generator=generator, dtype=torch.float64)
        noise = (noise * amplitude).to(batch)
        try:
            with torch.inference_mode():
                finite = all(torch.isfinite(tensor).all() for tensor in _outputs(model, noise))
        except Exception:
            continue
        return noise if finite else None
    return None


@torch.inference_mode()
def check_equivalence(gated: nn.Module, slim: nn.Module, inputs: Sequence[Tensor]) -> EquivalenceReport:
    """Compare two models in float64; each output has its own tolerance, and the one closest to it is reported."""
    report = EquivalenceReport(float("inf"), TOLERANCE, [list(batch.shape) for batch in inputs])
    # For each output: the largest difference, the largest value, and the largest change from input to input.
    stats: dict[int, tuple[float, float, float]] = {}
    finite = True
    for batch in inputs:
        dense = _outputs(gated, batch)
        try:
            outputs = _outputs(slim, batch)
        except Exception as error:
            report.reason = f"it fails on an input of shape {tuple(batch.shape)}: {first_line(error)}"
            return report
        for index, (a, b) in enumerate(zip(dense, outputs, strict=True)):
            if a.shape != b.shape:
                report.reason = f"output {tuple(b.shape)}, not {tuple(a.shape)}"
                return report
            gap, scale, spread = stats.get(index, (0.0, 1.0, 0.0))
            finite &= bool(torch.isfinite(a).all() and torch.isfinite(b).all())
            if a.dim() > 0 and len(a) > 1:
                spread = max(spread, float((a[1:] - a[:1]).abs().max()))
            stats[index] = max(gap, float((a - b).abs().max())), max(scale, float(a.abs().max())), spread
    gap, scale, _ = max(stats.values(), key=lambda stat: stat[0] / stat[1])
    report.max_abs_diff, report.tolerance = gap, TOLERANCE * scale
    if not finite:
        report.reason = "an output is not finite"
    elif not any(spread > TOLERANCE * scale for _, scale, spread in stats.values()):
        report.reason = DEAD
    elif not gap <= report.tolerance:
        report.reason = f"the outputs differ by {gap:.2g}, more than {report.tolerance:.2g}"
    report.passed = report.reason is None
    return report


@torch.inference_mode()
def output_difference(a: nn.Module, b: nn.Module, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest and the mean absolute difference between two models' outputs, in their own precision."""
    largest, total, count = 0.0, 0.0, 0
    for batch in inputs:
        for x, y in zip(_outputs(a, batch), _outputs(b, batch), strict=True):
            gap = (x.double() - y.double()).abs()
            largest, total, count = max(largest, float(gap.max())), total + float(gap.sum()), count + gap.numel()
    return largest, total / max(count, 1)


def _outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    first = next(model.parameters())
    outputs = tensors_in(model(batch.to(first.device, first.dtype)))
    return [tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in outputs if tensor.numel()]
