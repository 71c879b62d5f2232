"""One optimizer step over the micro-batches of all processes.

A step takes ``accumulate`` micro-batches in each process. Gradients, loss, penalty and the change of the norms' running
statistics are means over all micro-batches, so it makes no difference, except for rounding, which process takes which;
after each step all processes hold the same bits. A step with a number that is not finite changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten  # one call for hundreds of tensors

from prunekit.data.datasets import normalize
from prunekit.errors import TrainingError
from prunekit.pruning.sparsity.dynamic_decay import Decay
from prunekit.training.acceleration import Forward
from prunekit.training.training_job import TrainingJob
from prunekit.utils import distributed

MAX_CONSECUTIVE_SKIPS = 10
_SCALARS = 3  # loss, penalty and stop flag: the last entries of a step's vector


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step; all are scalar tensors on the device.

    Attributes:
        loss: mean over the micro-batches of all processes.
        penalty: of the decay, mean over all processes.
        finite: whether every number was finite, so that the step was applied.
    """

    loss: Tensor
    penalty: Tensor
    finite: Tensor


class TrainingStep:
    """Performs the steps of one model.

    Args:
        model: on ``job.device``.
        optimizer: of the model.
        job: its config, loss and device.
        accumulate: micro-batches of a step in this process.

    Attributes:
        micro_batches: micro-batches of a step in all processes.
        synchronous: whether each step waits for the device to know if it was finite. On an accelerator, Adam does not:
            it skips the step on the device (``found_inf``), and :meth:`check` reports it later.
        failed: whether a step since the last check is known to be not finite.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, job: TrainingJob, accumulate: int = 1):
        self.model, self.optimizer, self.job, self.accumulate = model, optimizer, job, accumulate
        self.micro_batches = accumulate * distributed.world_size()
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        buffers = dict(model.named_buffers())
        self.statistics_names = [name for name, buffer in buffers.items() if buffer.is_floating_point()]
        self.statistics = _FlatTensors([buffers[name] for name in self.statistics_names])
        self.other_buffers = _by_dtype([b for name, b in buffers.items() if name not in self.statistics_names])
        # Only Adam (AdamW is a subclass) skips a first step without leaving uninitialized momentum.
        self.synchronous = job.device.type == "cpu" or not isinstance(optimizer, torch.optim.Adam)
        self.failed = False
        self._stop_requested = self._stop = False
        self._stop_received = torch.zeros((), device=job.device)
        self._steps = 0
        self._first_bad: Tensor | None = None  # the vector of the first bad step since the last check
        # Bad steps since the last check, consecutive bad steps, and the number of the first bad step.
        self._bad, self._consecutive, self._first_bad_step = (
            torch.zeros((), dtype=torch.int64, device=job.device) for _ in range(3)
        )

    def __call__(self, forward: Forward, decay: Decay, batches: Iterable[tuple[Tensor, Tensor]]) -> StepResult:
        """Perform one step.

        Args:
            forward: of the model.
            decay: its penalty is added to the loss.
            batches: this process's micro-batches: images with levels 0 to 255, (N, 3, H, W), and targets.
        """
        statistics, others = self.statistics.read(), [tensors.read() for tensors in self.other_buffers]
        self.optimizer.zero_grad(set_to_none=True)
        losses, change = [], None
        for number, (images, targets) in enumerate(batches, 1):
            if number > 1:
                self._restore_buffers(statistics, others)
            loss = self._loss(forward, images, targets)
            losses.append(loss.detach())
            objective = loss / self.accumulate if self.accumulate > 1 else loss
            if number == self.accumulate:
                penalty = decay.penalty().to(loss.device)
                objective = objective + penalty
            objective.backward()
            if self.micro_batches > 1:
                delta = (self.statistics.read() - statistics) / self.accumulate
                change = delta if change is None else change + delta
        with torch.no_grad():
            vector = self._reduce(torch.stack(losses).mean(), penalty, statistics, change)
            finite = self._apply(vector, statistics, others)
            return StepResult(vector[-_SCALARS], vector[1 - _SCALARS], finite)

    def _loss(self, forward: Forward, images: Tensor, targets: Tensor) -> Tensor:
        job = self.job
        images = normalize(images.to(job.device))
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.config.precision == "bf16"):
            teacher_logits, logits = job.loss.teacher_logits(images), forward(images)
        return job.loss(logits, targets.to(job.device), teacher_logits)

    def _reduce(self, loss: Tensor, penalty: Tensor, before: Tensor, change: Tensor | None) -> Tensor:
        """Return gradients, statistics, loss, penalty and stop flag of all processes as one vector; set the first two.

        Args:
            before: statistics before the step.
            change: of the statistics in this process; None where one micro-batch has already set them.
        """
        gradients = self._gradients()
        stop = torch.full_like(loss, self._stop_requested, dtype=torch.float32)
        statistics = self.statistics.read() if change is None else change
        vector = torch.cat([gradients.read(), statistics, torch.stack([loss.float(), penalty.float(), stop])])
        if distributed.world_size() > 1:
            gradients.write(distributed.all_reduce_mean_(vector)[: gradients.length])
            self._stop_received = torch.maximum(self._stop_received, vector[-1])
        if change is not None:
            vector[gradients.length : -_SCALARS] += before
            self.statistics.write(vector[gradients.length : -_SCALARS])
        return vector

    def _apply(self, vector: Tensor, statistics: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Step the optimizer if everything is finite, else restore the buffers; return whether it is."""
        length = self._gradients().length
        # Optimizers square gradients, so their squares must be finite too.
        finite = torch.isfinite(torch.dot(vector[:length], vector[:length]) + (vector[length:] * 0).sum())
        is_first_bad = ~finite & (self._bad == 0)
        self._steps += 1
        if self.synchronous:
            if finite:
                self.optimizer.step()
            else:
                self._restore_buffers(statistics, others)
                self.failed = True
            if is_first_bad:
                self._first_bad = vector
            self._stop = bool(self._stop_received > 0)
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = (~finite).float(), None
            self.optimizer.step()
            for tensors, before in zip([self.statistics, *self.other_buffers], [statistics, *others], strict=True):
                tensors.write(torch.where(finite, tensors.read(), before))
            previous = torch.zeros_like(vector) if self._first_bad is None else self._first_bad
            self._first_bad = torch.where(is_first_bad, vector, previous)
        self._first_bad_step = torch.where(is_first_bad, self._steps, self._first_bad_step)
        self._bad = self._bad + ~finite
        self._consecutive = torch.where(finite, 0, self._consecutive + 1)
        return finite

    def _restore_buffers(self, statistics: Tensor, others: Sequence[Tensor]) -> None:
        for tensors, before in zip([self.statistics, *self.other_buffers], [statistics, *others], strict=True):
            tensors.write(before)

    def _gradients(self) -> _FlatTensors:
        return _FlatTensors([p.grad for _, p in self.parameters if p.grad is not None])

    def should_stop(self, requested: bool) -> bool:
        """Whether to stop after this step; ``requested`` in this process. Several processes stop after the same step:
        the next step sends the request to all."""
        self._stop_requested = requested
        return requested if distributed.world_size() == 1 else self._stop

    def check(self, epoch: int, step: int) -> None:
        """Report the steps since the last check that were not finite. Waits for the device.

        Args:
            epoch: of the last step, from 0.
            step: the last step, from 0.

        Raises:
            TrainingError: there was one and the recipe does not skip such steps, or too many came in a row.
        """
        self._stop = bool(self._stop_received > 0)
        bad, consecutive = int(self._bad), int(self._consecutive)
        if not bad:
            return
        job = self.job
        section = "train" if job.stage in ("train", "baseline") else "finetune"
        first = step + 1 - self._steps + int(self._first_bad_step)
        cause = f"{self._describe(self._first_bad)} at epoch {epoch + 1}, step {first}"
        skip = job.config.on_nonfinite == "skip"
        if not skip or consecutive >= MAX_CONSECUTIVE_SKIPS:
            count = f", and {consecutive} steps in a row were skipped" if skip else ""
            other = f"{section}.precision=float32" if job.config.precision == "bf16" else "decay.weight"
            hint = "" if skip else f"; to skip such steps, use --resume with {section}.on_nonfinite=skip"
            raise TrainingError(f"{cause}{count}; try a lower {section}.lr or {other}{hint}")
        job.reporter.info(f"{job.stage}: {bad} {'steps' if bad > 1 else 'step'} skipped: {cause}")
        self._bad, self._first_bad, self.failed = torch.zeros_like(self._bad), None, False

    def _describe(self, vector: Tensor) -> str:
        """Name the first cause, in the order of computation, in the vector of a bad step."""
        for name, parameter in self.model.named_parameters():
            if (value := _first_nonfinite(parameter.detach())) is not None:
                norm = self.model.get_submodule(name.rpartition(".")[0])
                gate = isinstance(norm, nn.modules.batchnorm._BatchNorm) and name.endswith(".weight")
                return f"the {'gate' if gate else 'parameter'} {name} is {value}"
        names = [name for name, p in self.parameters if p.grad is not None]
        gradients = self._gradients()
        by_name = dict(zip(names, gradients.split(vector), strict=True))
        statistics = self.statistics.split(vector[gradients.length :])
        candidates = [("the loss", vector[-_SCALARS]), ("the penalty", vector[1 - _SCALARS])]
        candidates += [(f"the gradient of {name}", gradient) for name, gradient in by_name.items()]
        candidates += [(f"the statistic {n}", s) for n, s in zip(self.statistics_names, statistics, strict=True)]
        for what, values in candidates:
            if (value := _first_nonfinite(values)) is not None:
                return f"{what} is {value}"
        largest = {name: float(gradient.abs().max()) for name, gradient in by_name.items()}
        name = max(largest, key=largest.get)
        return f"the gradient of {name} is {largest[name]:.1e}, whose square overflows,"


class _FlatTensors:
    """Several tensors, read and written as one vector."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        self.sizes = [tensor.numel() for tensor in self.tensors]
        self.length = sum(self.sizes)

    @torch.no_grad()
    def read(self) -> Tensor:
        return flatten(self.tensors) if self.tensors else torch.zeros(0)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        if self.tensors:
            torch._foreach_copy_(self.tensors, list(self.split(vector)))

    def split(self, vector: Tensor) -> Iterator[Tensor]:
        """Yield the start of a vector in the shapes of the tensors."""
        for tensor, part in zip(self.tensors, vector[: self.length].split(self.sizes), strict=True):
            yield part.view(tensor.shape)


def broadcast_model(model: nn.Module) -> None:
    """Copy parameters and buffers of the main process to all others."""
    if distributed.world_size() > 1:
        for tensors in _by_dtype([*model.parameters(), *model.buffers()]):
            tensors.write(distributed.broadcast(tensors.read()))


def assert_identical_models(model: nn.Module, what: str) -> None:
    """Raise TrainingError, which names ``what``, if the processes' models are not equal to the last bit."""
    if distributed.world_size() > 1:
        tensors = _by_dtype([*model.parameters(), *model.buffers()])
        distributed.assert_identical([one.read() for one in tensors], what)


def _by_dtype(tensors: Iterable[Tensor]) -> list[_FlatTensors]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor.detach())
    return [_FlatTensors(group) for group in groups.values()]


def _first_nonfinite(values: Tensor) -> float | None:
    bad = values[~torch.isfinite(values)]
    return float(bad.flatten()[0]) if bad.numel() else None
