"""The equivalence check: a slim model is compared with the dense model in which the same channels are replaced.

Both run in float64 on the CPU, on data at several sizes and on noise; they pass if, for each image and output,
max|a − b| ≤ 1e-6 · max(1, max|a|).
An output that is not finite, or that hardly changes from input to input, fails, because the comparison says nothing.
See docs/design/surgery.md for models that amplify rounding errors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import zeroing_masks
from prunekit.pruning.graph.silence import silence
from prunekit.pruning.graph.trace import tensors_in
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.check_sizes import varied_sizes
from prunekit.pruning.surgery.copies import clone
from prunekit.pruning.surgery.precision import in_float64
from prunekit.utils.inputs import (
    Example,
    batch_length,
    batched,
    call,
    cast,
    describe_shapes,
    first_inputs,
    map_tensors,
    shapes_of,
    tensors_of,
)
from prunekit.utils.text import first_line

TOLERANCE = 1e-6
PERTURBATION = 1e-13  # of each weight, relative: some hundred times the rounding of float64
MARGIN = 10.0  # rounding errors may move the output this many times as far as the perturbation does
MAX_SENSITIVITY = 1e-4  # of an output, relative: an image on which rounding errors may move it further says nothing
Outputs = dict[int, list[Tensor]]  # by the id of the batch
INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}
DEAD = "the output is the same for every input: the network is dead"
NOT_FINITE = "an output is not finite"
SENSITIVE = "the dense model is too sensitive to be compared"


@dataclass
class EquivalenceReport:
    """The measured differences between the slim model, the dense one with the same channels replaced, and the dense one
    as given (the drift)."""

    max_abs_diff: float  # in float64, over all inputs and outputs
    tolerance: float  # its limit: 1e-6 · max(1, max|dense|) of its image, or the sensitivity where that is larger
    inputs: list[list[Any]]  # their shapes; a list of shapes each where the model takes several tensors
    float32_diff: float = float("nan")  # the same difference in float32
    passed: bool = False
    reason: str | None = None  # why it does not pass
    drift: float = float("nan")  # largest difference from the dense model as given, on the data; NaN: other shapes
    drift_mean: float = float("nan")  # mean absolute difference from it
    output_size: float = float("nan")  # its largest absolute output
    sensitivity: float | None = None  # how far rounding errors move the dense model's output, where that was measured
    given_back: int = 0  # dead channels that are kept because cutting them changes the output
    folded: int = 0  # dead channels whose constants are folded
    carriers: int = 0  # dead channels kept as constants
    unread: int = 0  # dead channels kept, with weights of zero, so that the groups of a convolution stay of one size
    # For each module that channels are given back for, how far its output would move without them.
    inexact: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = field(default=None, repr=False)  # of the slim model

    def measure_drift(self, dense: Sequence[Tensor], slim: Sequence[Tensor]) -> None:
        """Set ``drift``, ``drift_mean`` and ``output_size`` from the outputs of the model as given and the slim one."""
        self.drift, self.drift_mean = output_difference(dense, slim)
        self.output_size = max(float(tensor.double().abs().max()) for tensor in dense)

    def describe_drift(self) -> str:
        if self.drift != self.drift:
            return "drift from the dense model: not measured, because the outputs differ in shape"
        return (
            f"drift from the dense model: at most {self.drift:.2g}, {self.drift_mean:.2g} on average, of outputs up to "
            f"{self.output_size:.2g}"
        )

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["plan"]
        return {key: value for key, value in data.items() if value is not None and value == value and value != {}}


def zero_dead_gates(model: nn.Module, groups: Sequence[Group], dead: Mapping[str, Iterable[int]]) -> nn.Module:
    """Return a copy of a model in eval mode whose dead channels have a gate of zero (see ``zeroing_masks``), or, where
    they have none, weights and biases of zero (see ``silence``)."""
    copied = clone(model).eval()
    with torch.no_grad():
        for group in groups:
            if not dead.get(group.id):
                continue
            if group.combine is None:
                silence(copied, group, np.array(sorted(dead[group.id])))
                continue
            for gate, mask in zip(group.gates, zeroing_masks(model, group, dead[group.id]), strict=True):
                weight = copied.get_submodule(gate.norm).weight
                weight[slice(*gate.slice)][torch.from_numpy(mask).to(weight.device)] = 0
    return copied


def check_sizes(model: nn.Module, example: Example, thorough: bool = True) -> Sequence[tuple[int, ...]]:
    """Return ``varied_sizes`` of a model, none where the example is not one tensor of images."""
    if not isinstance(example, Tensor) or example.dim() not in INTERPOLATION or not example.is_floating_point():
        return ()
    with torch.compiler.set_stance("force_eager"):  # compiled parts would hide their sizes
        return varied_sizes(model, example, thorough)


def check_inputs(
    model: nn.Module | None, example: Example, sizes: Sequence[tuple[int, ...]] | None = None, limit: int = 8
) -> list[Example]:
    """Return batches in float64 on the CPU: the data, and two of its images at each other size (``check_sizes``) that
    the model accepts; without a model at all of them."""
    data = map_tensors(lambda tensor: tensor.detach().cpu(), cast(first_inputs(example, limit), torch.float64))
    if batch_length(data) == 1:
        rows = {id(tensor) for tensor in batched(data)}
        data = map_tensors(lambda tensor: _with_another(tensor) if id(tensor) in rows else tensor, data)
    # Where it is not known what a batch is, a second batch has other inputs.
    batches = [data] if batched(data) else [data, map_tensors(_another, data)]
    for size in check_sizes(model, data) if sizes is None else sizes:
        assert isinstance(data, Tensor)
        if size == data.shape[2:]:
            continue
        batch = F.interpolate(data[:2], size=size, mode=INTERPOLATION[data.dim()])
        try:
            if model is not None:
                outputs_of(model, batch[:1])
        except Exception:
            continue  # The shapes in the report show the sizes that the model accepts.
        batches.append(batch)
    return batches


def _with_another(batch: Tensor) -> Tensor:
    """Add a second, different input to a batch of one."""
    return torch.cat([batch, _another(batch)])


def _another(batch: Tensor) -> Tensor:
    other = batch.flip(-1)
    return 0.5 * other if other.is_floating_point() else other


def compared_inputs(inputs: Sequence[Example], sizes: Sequence[tuple[int, ...]]) -> list[Example]:
    """Choose of ``check_inputs`` what shows all that a model does, cheapest first: two images, one of each other size.

    The data is among them only where its size is one of the sizes.
    """
    if not batched(inputs[0]):
        return list(inputs)
    enough = len(inputs) == len(sizes) + 1 > 1
    first, *others = sorted(inputs[1:] if enough else inputs, key=values_of_one)
    return [first_inputs(first, 2), *(first_inputs(batch, 1) for batch in others)]


def values_of_one(batch: Example) -> int:
    """The number of values of one input."""
    return sum(tensor.numel() for tensor in tensors_of(first_inputs(batch, 1)))


def noise_batch(model: nn.Module | None, batch: Example, count: int, side: int = 64) -> Example | None:
    """Return noise of 0.1 to 30 times the amplitude of a batch, to find what holds on the data by chance.

    It has ``count`` images of size ``side``, or of the batch's size where the model accepts no other, or where there is
    no model. None where the model's output is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    if not isinstance(batch, Tensor) or batch.dim() < 2 or not batch.is_floating_point():
        rows = {id(tensor) for tensor in batched(batch)}
        noise = map_tensors(lambda tensor: _noise(tensor, count, generator) if id(tensor) in rows else tensor, batch)
        return noise if rows and (model is None or _is_finite(model, noise)) else None
    ones = [1] * (batch.dim() - 2)
    side = min(side, 16) if len(ones) > 2 else side  # of volumes, for the memory they take
    amplitude = torch.logspace(-1, 1.5, count, dtype=torch.float64).view(-1, 1, *ones) * float(batch.double().std())
    sides = [] if model is None else [(side,) * len(ones)]
    for size in dict.fromkeys([*sides, tuple(batch.shape[2:])]):
        noise = torch.randn(count, batch.shape[1], *size, generator=generator, dtype=torch.float64)
        noise += torch.randn(count, batch.shape[1], *ones, generator=generator, dtype=torch.float64)
        noise = (noise * amplitude).to(batch)
        if model is None:
            return noise
        if (finite := _is_finite(model, noise)) is not None:
            return noise if finite else None
    return None


def _noise(batch: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Noise of 0.1 to 30 times the amplitude of a batch, or other tokens of the same range; masks are repeated."""
    shape = (count, *batch.shape[1:])
    if batch.dtype == torch.bool:
        return batch[:1].expand(shape)
    if not batch.is_floating_point():
        return torch.randint(int(batch.min()), int(batch.max()) + 1, shape, generator=generator).to(batch)
    amplitude = torch.logspace(-1, 1.5, count, dtype=torch.float64).view(-1, *[1] * (batch.dim() - 1))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * amplitude * float(batch.std())).to(batch)


def _is_finite(model: nn.Module, batch: Example) -> bool | None:
    """Whether the outputs are finite; None where the model fails."""
    try:
        return all(bool(torch.isfinite(tensor).all()) for tensor in outputs_of(model, batch))
    except Exception:
        return None


@dataclass
class _Difference:
    """One output on one batch; the tensors have a value for each image."""

    output: int
    batch: int
    gap: Tensor  # largest difference between the models
    size: Tensor  # largest value of the dense model
    spread: float  # largest change from the first image
    moved: Tensor | float = 0.0  # how far rounding errors move the dense model's output


def check_equivalence(
    gated: nn.Module, slim: nn.Module, inputs: Sequence[Example], known: Sequence[Outputs] = ({}, {})
) -> EquivalenceReport:
    """Compare two models in float64; each output has its own tolerance, and the one closest to it is reported.

    Args:
        known: outputs of the two models, by the id of the batch; others are computed.
    """
    report = EquivalenceReport(float("inf"), TOLERANCE, [])
    differences: list[_Difference] = []
    finite = slim_finite = True
    accepted: list[Example] = []
    first: list[Tensor] = []
    for batch in inputs:
        try:
            dense = known[0].get(id(batch)) or outputs_of(gated, batch)
        except Exception:
            if not accepted:
                raise
            continue  # The shapes in the report show the sizes that the model accepts.
        number = len(accepted)
        accepted.append(batch)
        first = first or dense
        report.inputs.append(_shape(batch))
        try:
            outputs = known[1].get(id(batch)) or outputs_of(slim, batch)
        except Exception as error:
            report.reason = f"it fails on {describe_shapes(batch)}: {first_line(error)}"
            return report
        shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, dense))
        if shapes != expected:
            report.reason = f"output {', '.join(map(str, shapes))}, not {', '.join(map(str, expected))}"
            return report
        for index, (a, b) in enumerate(zip(dense, outputs, strict=True)):
            finite &= bool(torch.isfinite(a).all())
            slim_finite &= bool(torch.isfinite(b).all())
            spread = float((a[1:] - a[:1]).abs().max()) if a.dim() > 0 and len(a) > 1 else 0.0
            if not batched(batch):
                spread = float((a - first[index]).abs().max()) if a.shape == first[index].shape else float("inf")
            count = batch_length(batch)
            sizes = _by_image(a - b, count), _by_image(a, count)
            differences.append(_Difference(index, number, *sizes, spread))
    if not differences:
        report.reason = "every output is empty; pass an example for which the model returns something"
    elif not finite:
        report.reason = NOT_FINITE
    elif not slim_finite:
        report.reason = "an output of the slim model is not finite"
    else:
        _judge(report, gated, accepted, differences)
    report.passed = report.reason is None
    return report


def _shape(batch: Example) -> list[Any]:
    shapes = shapes_of(batch)
    return shapes[0] if len(shapes) == 1 else shapes


def check_all(
    gated: nn.Module, slim: nn.Module, inputs: Sequence[Example], noise: Sequence[Example]
) -> EquivalenceReport:
    """``check_equivalence`` on data, then on batches of noise, where an output of the dense model that is the same for
    all of it, or not finite, says nothing."""
    known = [_run_together(model, [*inputs, *noise]) for model in (gated, slim)]
    report = check_equivalence(gated, slim, inputs, known)
    if report.reason in (DEAD, NOT_FINITE):  # perhaps for what the noise does to the data, where norms measure a batch
        known = [{}, {}]
        report = check_equivalence(gated, slim, inputs)
    for batch in noise if report.passed else ():
        # Checked apart, because its outputs may be larger and allow a larger tolerance.
        other = check_equivalence(gated, slim, [batch], known)
        if other.reason not in (None, DEAD, NOT_FINITE):
            report.passed, report.reason = False, f"on noise {other.reason}"
    return report


def _run_together(model: nn.Module, batches: Sequence[Example]) -> Outputs:
    """The outputs on images of one size, of which all batches run as one; none where they cannot be told apart."""
    sizes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for batch in batches:
        if isinstance(batch, Tensor):
            sizes[tuple(batch.shape[1:])].append(batch)
    found: Outputs = {}
    for own in sizes.values():
        lengths = [len(batch) for batch in own]
        with suppress(Exception):  # Then the batches run one by one.
            outputs = outputs_of(model, torch.cat(own)) if len(own) > 1 else []
            if all(tensor.dim() and len(tensor) == sum(lengths) for tensor in outputs):
                parts = [tensor.split(lengths) for tensor in outputs]
                found |= {id(batch): list(row) for batch, row in zip(own, zip(*parts, strict=True), strict=False)}
    return found


def _judge(
    report: EquivalenceReport, gated: nn.Module, inputs: Sequence[Example], differences: list[_Difference]
) -> None:
    everything = [torch.ones(batch_length(batch), dtype=torch.bool) for batch in inputs]
    report.max_abs_diff, report.tolerance = _closest(differences, everything)
    scales = {
        d.output: max(1.0, *(float(o.size.max()) for o in differences if o.output == d.output)) for d in differences
    }
    if not any(d.spread > TOLERANCE * scales[d.output] for d in differences):
        report.reason = DEAD
        return
    if report.max_abs_diff <= report.tolerance:
        return
    # The difference may be one of rounding errors, which the model amplifies.
    _measure_sensitivity(gated, inputs, differences)
    report.sensitivity = max(float(d.moved.max()) for d in differences)
    kept = everything
    for d in differences:
        kept[d.batch] &= d.moved <= MAX_SENSITIVITY * d.size.clamp(min=1.0)
    if not all(mask.any() for mask in kept):
        report.reason = (
            f"{SENSITIVE}: changing its weights by a factor of 1 ± {PERTURBATION:g} moves its output by "
            f"{report.sensitivity / MARGIN:.2g}; check the statistics of its norms, or pass an example of real data"
        )
        return
    report.max_abs_diff, report.tolerance = _closest(differences, kept)
    if report.max_abs_diff > report.tolerance:
        report.reason = f"the outputs differ by {report.max_abs_diff:.2g}, more than {report.tolerance:.2g}"


def _closest(differences: Sequence[_Difference], kept: Sequence[Tensor]) -> tuple[float, float]:
    """Return the difference that is closest to its tolerance, and that tolerance, over the images that are kept."""
    found = []
    for d in differences:
        tolerance = (TOLERANCE * d.size.clamp(min=1.0)).maximum(torch.as_tensor(d.moved))
        gap, tolerance = d.gap[kept[d.batch]], tolerance[kept[d.batch]]
        worst = int((gap / tolerance).argmax())
        found.append((float(gap[worst]), float(tolerance[worst])))
    return max(found, key=lambda pair: pair[0] / pair[1])


def _measure_sensitivity(gated: nn.Module, inputs: Sequence[Example], differences: Sequence[_Difference]) -> None:
    """Set ``moved``: how far each output moves when every weight changes by a rounding error."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        perturbed = clone(gated)
        for tensor in (*perturbed.parameters(), *perturbed.buffers()):
            if tensor.is_floating_point():
                signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int8) * 2 - 1
                tensor.data.mul_(1 + PERTURBATION * signs.to(tensor.dtype))
        for number, batch in enumerate(inputs):
            pairs = zip(outputs_of(gated, batch), outputs_of(perturbed, batch), strict=True)
            gaps = [_by_image(a - b, batch_length(batch)) for a, b in pairs]
            for d in differences:
                if d.batch == number:
                    d.moved = (MARGIN * gaps[d.output].nan_to_num(float("inf"))).maximum(torch.as_tensor(d.moved))


def _by_image(tensor: Tensor, count: int) -> Tensor:
    """The largest absolute value for each image of a batch; of all where the output has no axis of images."""
    values = tensor.detach().abs().double()
    if values.dim() > 0 and len(values) == count:
        return values.reshape(count, -1).amax(1)
    return values.max().expand(count)


def check_repeatable(model: nn.Module, batch: Example) -> list[Tensor]:
    """Return the outputs of a model; raise PlanError where three runs differ: nothing could be compared with it."""
    first, *others = (outputs_of(model, batch) for _ in range(3))
    same = all([a.shape for a in first] == [b.shape for b in other] for other in others)
    pairs = [pair for other in others for pair in zip(first, other, strict=True)] if same else []
    gap = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    if not same or gap > TOLERANCE * max([1.0, *(float(a.abs().max()) for a in first)]):
        amount = f"by {gap:.2g}" if same else "in shape"
        raise PlanError(
            f"the dense model is random in eval mode: two runs on the same input differ {amount}; make it repeat, such "
            "as by F.dropout(x, training=self.training), or drop the state that it keeps between calls"
        )
    return first


def output_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest and the mean absolute difference over all tensors; NaN where they differ in shape."""
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        return float("nan"), float("nan")  # as of a detector that finds more
    values = torch.cat([(x.double() - y.double()).abs().flatten() for x, y in zip(a, b, strict=True)])
    return float(values.max()), float(values.mean())


@torch.inference_mode()
def outputs_of(model: nn.Module, batch: Example) -> list[Tensor]:
    """Run a model on a copy of a batch, since it may change its input; return its outputs that are not empty."""
    first = next(model.parameters())
    given = map_tensors(lambda tensor: tensor.to(first.device, copy=True), cast(batch, first.dtype))
    with in_float64() if first.dtype == torch.float64 else nullcontext():
        outputs = tensors_in(call(model, given))
    return [tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in outputs if tensor.numel()]
