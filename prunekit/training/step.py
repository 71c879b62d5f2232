"""One step of a training: what its micro-batches say together, and the optimiser's step by it.

A micro-batch is what one forward sees, ``batch_size`` images. A step takes ``accumulate`` of them in each process, and
it does not matter which process takes which: gradients, loss and penalty are means over all, and so is what each moves
the norms' running statistics by, from where they stood before the step. So two processes do what one does that
accumulates two, but for rounding, and behind each step all processes hold the same bits. (The penalty is linear in the
responses of the images, so that the mean of its gradients is the gradient by the mean of the responses. All is sent in
one row: a wrapper as torch's DistributedDataParallel would send gradients while others are still made, which at these
sizes gains nothing, and would stand between the model and those that replace its forwards.)

A step in which a number is not finite is none: weights, moments and statistics stay as they were before it. On an
accelerator nothing waits for that: the optimiser is told there (``found_inf``, as by torch's gradient scaler), what the
first such step was like is kept, and :meth:`Update.look` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten  # in one call; there are hundreds

from prunekit.data.datasets import normalize
from prunekit.errors import TrainingError
from prunekit.pruning.sparsity.decay import Decay
from prunekit.training.acceleration import Forward
from prunekit.training.job import TrainingJob
from prunekit.utils import distributed

MOST = 10  # steps in a row that are none; more of the same will not help
_FIGURES = 3  # loss, penalty and whether to stop stand behind all else


class TrainingStep:
    """The steps of one model.

    Args:
        model: on ``job.device``.
        optimizer: of it.
        job: its section, task and device.
        accumulate: how many micro-batches a step takes in this process.

    Attributes:
        shares: how many it takes in all.
        troubled: whether a step is known to have been none since the last look.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, job: TrainingJob, accumulate: int = 1):
        self.model, self.optimizer, self.job, self.accumulate = model, optimizer, job, accumulate
        self.shares = accumulate * distributed.world_size()
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        buffers = dict(model.named_buffers())
        self.names = [name for name, buffer in buffers.items() if buffer.is_floating_point()]
        self.statistics = _Row([buffers[name] for name in self.names])
        self.others = _rows([buffer for name, buffer in buffers.items() if name not in self.names])
        # A first step of SGD that is none would leave moments that were never set.
        self.waits = job.device.type == "cpu" or not isinstance(optimizer, torch.optim.Adam)  # AdamW is one
        self.troubled = False
        self._asked = self._stopping = False
        self._heard = torch.zeros((), device=job.device)
        self._calls = 0
        self._first: Tensor | None = None
        # Steps that were none since the last look, and in a row, and when the first was.
        self._bad, self._in_a_row, self._when = (torch.zeros((), dtype=torch.int64, device=job.device) for _ in "123")

    def __call__(
        self, forward: Forward, decay: Decay, batches: Iterable[tuple[Tensor, Tensor]], sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            forward: of the model.
            decay: its penalty is added to the loss.
            batches: the micro-batches of this process: images with levels 0 to 255, and targets.
            sums: float64 [3] on the device; gets loss, penalty and 1 added where the step is one.

        Returns:
            loss and penalty, means over the micro-batches of all processes; scalars on the device.
        """
        held, others = self.statistics.read(), [row.read() for row in self.others]
        self.optimizer.zero_grad(set_to_none=True)
        losses, moved = [], None
        for number, (images, targets) in enumerate(batches, 1):
            if number > 1:
                self._put_back(held, others)
            loss = self._loss(forward, images, targets)
            losses.append(loss.detach())
            part = loss / self.accumulate if self.accumulate > 1 else loss
            if number == self.accumulate:
                penalty = decay.penalty().to(loss.device)
                part = part + penalty
            part.backward()
            if self.shares > 1:
                by = (self.statistics.read() - held) / self.accumulate
                moved = by if moved is None else moved + by
        with torch.no_grad():
            row = self._gathered(torch.stack(losses).mean(), penalty, held, moved)
            good = self._apply(row, held, others)
            loss, penalty = row[-_FIGURES], row[1 - _FIGURES]
            sums += torch.where(good, torch.stack([loss, penalty, torch.ones_like(loss)]), 0.0)
        return loss, penalty

    def _loss(self, forward: Forward, images: Tensor, targets: Tensor) -> Tensor:
        job = self.job
        images = normalize(images.to(job.device))
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.section.precision == "bf16"):
            taught, output = job.criterion.taught(images), forward(images)
        return job.criterion(output, targets.to(job.device), taught)

    def _gathered(self, loss: Tensor, penalty: Tensor, held: Tensor, moved: Tensor | None) -> Tensor:
        """All that a step has found, in a row: gradients, statistics, figures; of all processes."""
        gradients = self._gradients()
        statistics = self.statistics.read() if moved is None else moved
        figures = torch.stack([loss.float(), penalty.float(), torch.full_like(loss, self._asked, dtype=torch.float32)])
        row = torch.cat([gradients.read(), statistics, figures])
        if distributed.world_size() > 1:
            gradients.write(distributed.all_reduce_mean_(row)[: gradients.length])
            self._heard = torch.maximum(self._heard, row[-1])
        if moved is not None:
            row[gradients.length : -_FIGURES] += held
            self.statistics.write(row[gradients.length : -_FIGURES])
        return row

    def _apply(self, row: Tensor, held: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Let the optimiser step, where all is finite; whether it was."""
        length = self._gradients().length
        # An optimiser squares gradients; of the rest it is enough that each is finite.
        good = torch.isfinite(torch.dot(row[:length], row[:length]) + (row[length:] * 0).sum())
        fresh = ~good & (self._bad == 0)
        self._calls += 1
        if self.waits:
            if good:
                self.optimizer.step()
            else:
                self._put_back(held, others)
                self.troubled = True
            if fresh:
                self._first = row
            self._stopping = bool(self._heard > 0)
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = (~good).float(), None
            self.optimizer.step()
            for tensors, before in zip([self.statistics, *self.others], [held, *others], strict=True):
                tensors.write(torch.where(good, tensors.read(), before))
            self._first = torch.where(fresh, row, torch.zeros_like(row) if self._first is None else self._first)
        self._when = torch.where(fresh, self._calls, self._when)
        self._bad = self._bad + ~good
        self._in_a_row = torch.where(good, 0, self._in_a_row + 1)
        return good

    def _put_back(self, held: Tensor, others: Sequence[Tensor]) -> None:
        for tensors, before in zip([self.statistics, *self.others], [held, *others], strict=True):
            tensors.write(before)

    def _gradients(self) -> _Row:
        return _Row([p.grad for _, p in self.parameters if p.grad is not None])

    def stopping(self, asked: bool) -> bool:
        """Whether to stop behind this step, where this process has been asked to or not. Of several processes all stop
        behind the same step, so they hear of it with a step first."""
        self._asked = asked
        return asked if distributed.world_size() == 1 else self._stopping

    def look(self, epoch: int, step: int) -> None:
        """See whether there has been a step that was none; waits for the device.

        Args:
            epoch: that of the last step, from 0.
            step: the last one, from 0.

        Raises:
            TrainingError: there has been, and the recipe does not say to skip it, or :data:`MOST` came in a row.
        """
        self._stopping = bool(self._heard > 0)
        bad = int(self._bad)
        if not bad:
            return
        section = "train" if self.job.stage in ("train", "baseline") else "finetune"
        what = f"{self._fault(self._first)} at epoch {epoch + 1}, step {step + 1 - self._calls + int(self._when)}"
        skips = self.job.section.on_nonfinite == "skip"
        if not skips or int(self._in_a_row) >= MOST:
            many = f", and {int(self._in_a_row)} steps in a row were skipped" if skips else ""
            instead = f"{section}.precision=float32" if self.job.section.precision == "bf16" else "decay.weight"
            on = "" if skips else f"; {section}.on_nonfinite=skip with --resume goes on and skips such steps"
            raise TrainingError(f"{what}{many}; try a lower {section}.lr or {instead}{on}")
        self.job.reporter.info(f"{self.job.stage}: {bad} {'steps' if bad > 1 else 'step'} skipped: {what}")
        self._bad, self._first, self.troubled = torch.zeros_like(self._bad), None, False

    def _fault(self, row: Tensor) -> str:
        """What is not finite in a row, said of what comes first on the way of a step."""
        for name, parameter in self.model.named_parameters():
            if (found := _odd(parameter.detach())) is not None:
                norm = self.model.get_submodule(name.rpartition(".")[0])
                gate = isinstance(norm, nn.modules.batchnorm._BatchNorm) and name.endswith(".weight")
                return f"the {'gate' if gate else 'parameter'} {name} is {found}"
        for name, value in (("loss", row[-_FIGURES]), ("penalty", row[1 - _FIGURES])):
            if (found := _odd(value)) is not None:
                return f"the {name} is {found}"
        graded = [name for name, p in self.parameters if p.grad is not None]
        parts = dict(zip(graded, self._gradients().parts(row), strict=True))
        for name, part in parts.items():
            if (found := _odd(part)) is not None:
                return f"the gradient of {name} is {found}"
        behind = row[sum(part.numel() for part in parts.values()) :]
        for name, part in zip(self.names, self.statistics.parts(behind), strict=True):
            if (found := _odd(part)) is not None:
                return f"the statistic {name} is {found}"
        name, part = max(parts.items(), key=lambda one: float(one[1].abs().max()))
        return f"the gradient of {name} is {float(part.abs().max()):.1e}, whose square no number holds,"


class _Row:
    """Tensors that lie all over memory, as one row of numbers."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        self.sizes = [tensor.numel() for tensor in self.tensors]
        self.length = sum(self.sizes)

    def read(self) -> Tensor:
        with torch.no_grad():
            return flatten(self.tensors) if self.tensors else torch.zeros(0)

    def write(self, row: Tensor) -> None:
        if self.tensors:
            with torch.no_grad():
                torch._foreach_copy_(self.tensors, list(self.parts(row)))

    def parts(self, row: Tensor) -> Iterator[Tensor]:
        """The row, cut and shaped as the tensors are; what stands behind them is left."""
        for tensor, part in zip(self.tensors, row[: self.length].split(self.sizes), strict=True):
            yield part.view(tensor.shape)


def broadcast_model(model: nn.Module) -> None:
    """Give the models of all processes the parameters and buffers of that of process 0."""
    if distributed.world_size() > 1:
        for row in _rows([*model.parameters(), *model.buffers()]):
            row.write(distributed.broadcast(row.read()))


def assert_identical_models(model: nn.Module, what: str) -> None:
    """Raise TrainingError where the models of the processes are not the same to the last bit; ``what`` names them."""
    if distributed.world_size() > 1:
        distributed.assert_identical([row.read() for row in _rows([*model.parameters(), *model.buffers()])], what)


def _rows(tensors: Iterable[Tensor]) -> list[_Row]:
    """A row for each kind of number."""
    by: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by.setdefault(tensor.dtype, []).append(tensor.detach())
    return [_Row(tensors) for tensors in by.values()]


def _odd(values: Tensor) -> float | None:
    """The first of these numbers that is not finite."""
    bad = values[~torch.isfinite(values)]
    return float(bad.flatten()[0]) if bad.numel() else None
