"""One training loop, for sparse training and for fine-tuning.

Every epoch seeds its random generators from (seed, stage, epoch), and a state that is taken within one holds them. So a
run that goes on from a state does what it would have done without the stop.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import Component
from prunekit.data.cache import to_device
from prunekit.errors import TrainingError
from prunekit.native.library import load
from prunekit.pruning.plan import Group
from prunekit.pruning.sparsity.decay import Decay
from prunekit.pruning.sparsity.progressive import Cut
from prunekit.pruning.surgery.optimizer_state import slim_optimizer
from prunekit.training.acceleration import fast_steps, flush_denormals, sync_batch_norms
from prunekit.training.checkpoint import TrainingPosition, restore_state, save_state, split_batches
from prunekit.training.ema import WeightAverage
from prunekit.training.gate_history import GateHistory
from prunekit.training.job import TrainingJob, no_tracker
from prunekit.training.optimizers import param_groups
from prunekit.training.step import TrainingStep, assert_identical_models, broadcast_model
from prunekit.utils import distributed
from prunekit.utils.signals import defer_interrupts

# Below this a parameter is set to zero after each epoch. Decay leaves numbers on their way to zero; past 1e-38 they are
# subnormal, and a processor takes many times as long for each.
FLUSH = 1e-30
LOOK_EVERY = 10  # steps between two looks at loss and gates: a look waits for the device


def fit(model: nn.Module, job: TrainingJob, groups: Sequence[Group], decay: Decay) -> nn.Module:
    """Train a model in place; goes on from the newest training state in the run folder where there is one.

    Args:
        model: on ``job.device``.
        groups: of the model, for the count of living channels and the record of gates.
        decay: what drives the gates; see ``pruning.decay``.

    Returns:
        the model; with ``job.shrinking`` it is another one, once something has been cut.

    Raises:
        PlanError: the optimiser keeps what cannot be cut with its parameters.
        TrainingError: a loss, a penalty or a gradient is not finite; says epoch, step and which. Or another process of
            the run has died.
        CheckpointError: the training state does not fit the model.
    """
    return _Fit(model, job, groups, decay).run()


class _Fit:
    """One training under way: the model and all that trains it, which a cut replaces together."""

    def __init__(self, model: nn.Module, job: TrainingJob, groups: Sequence[Group], decay: Decay):
        self.model, self.groups, self.decay = model, groups, decay
        found = job.run.load_checkpoint(job.stage)
        self.job = job = split_batches(job, found)
        section, shrinking = job.section, job.shrinking
        self.gates = GateHistory(model, groups, job.threshold)
        if shrinking is not None and found is not None:
            self.groups = shrinking.restore(model, groups, found[1]["shrinking"])
            if shrinking.plan is not None:
                self._reshape(model, self.groups)
        self._equip(_optimizer(self.model, job, self.decay))
        self.schedule = bind_options(registry.schedules, section.schedule)
        self.augment = bind_options(registry.augmentations, section.augment)
        self.batch = min(section.batch_size, len(job.train) // self.update.shares)
        if not self.batch:
            raise TrainingError(
                f"{len(job.train)} images are too few for the {self.update.shares} batches of a step; "
                "start fewer processes, or lower train.accumulate and finetune.accumulate"
            )
        self.steps = len(job.train) // (self.batch * self.update.shares)
        self.place = restore_state(
            self.model, self.optimizer, self.gates, job, self.decay, self.steps, found, self.average
        )
        if distributed.world_size() > 1 and section.fast and job.device.type == "cpu":
            with distributed.main_process_first():
                load()  # compiled once, and found by the others
        broadcast_model(self.model)
        if self.average is not None:
            broadcast_model(self.average.model)
        self.saved = time.monotonic()
        self.total = max(1, section.epochs * self.steps)
        self.way = np.cumsum([self.schedule(step / self.total) for step in range(self.total)])
        self.train = to_device(job.train, job.device)

    def run(self) -> nn.Module:
        job, epochs, first = self.job, self.job.section.epochs, self.place.epoch
        if first < epochs:
            job.run.truncate_metrics(job.stage, first)
        losses = [line["loss"] for line in job.run.read_metrics() if line["stage"] == job.stage]
        job.reporter.start_training(job.stage, epochs, self.steps, first, losses, self.place.step)
        try:
            with (
                defer_interrupts() as self.stop,
                ExitStack() as self.watching,
                flush_denormals(),
                # A training that is done has nothing to track, and what came behind it is not to be dropped.
                (job.tracker if first < epochs else no_tracker)(first) as track,
            ):
                self._watch()
                for epoch in range(first, epochs):
                    line = self._epoch(epoch)
                    # The line first: one without its state is dropped and written again, a state without its line would
                    # leave a gap. The same goes for what is tracked.
                    track(line)
                    job.run.append_metrics(line)
                    self.place = TrainingPosition(epoch + 1, best=self.place.best)
                    # Asked once, since a signal may come between the two.
                    stopping = self.update.stopping(self.stop.requested)
                    last = epoch + 1 == epochs or (epoch + 1) % job.section.checkpoint.every == 0
                    if stopping or last or self._is_due():
                        self._rate(line["metrics"])
                        self._save()
                    job.reporter.log_epoch(line)
                    if stopping:
                        self._stop(f"epoch {epoch + 1}")
        finally:
            job.reporter.end_training()
        if self.average is not None and self.average.steps:
            self.average.put(self.model)
            _flush(self.model)
        job.run.note_skipped(job.stage)
        if job.stage == "train":
            job.run.write_arrays("gates.npz", self.gates.arrays())
        return self.model

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """One epoch; what ``metrics.jsonl`` holds of it."""
        job, shrinking, train, place = self.job, self.job.shrinking, self.train, self.place
        began = time.perf_counter() - place.seconds
        generator = seeded_generator(job.seed, job.stage, epoch)
        order = torch.randperm(len(train), generator=generator)
        where = order.to(train.images.device)
        place.sums = place.sums.to(job.device)
        due = shrinking is not None and shrinking.due(epoch + 1, job.section.epochs)
        if place.step:
            place.remind(generator, job.device)
        elif due:
            shrinking.begin()
        self.model.train()
        for step in range(place.step, self.steps):
            self._steer(epoch, step)
            factor = self.schedule((epoch * self.steps + step) / self.total)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            batches = self._batches(epoch, step, order, where, generator)
            loss, penalty = self.update(self.forward, self.decay, batches, place.sums)
            if self.average is not None:
                self.average.update(self.model)
            place.step = step + 1
            if self.update.troubled:
                self.update.look(epoch, step)
            if step % LOOK_EVERY == 0 or step == self.steps - 1:
                self.update.look(epoch, step)
                alive, of = self.gates.count()
                if due and step >= self.steps // 2:
                    shrinking.look(self.model, self.groups)
                done = epoch * self.steps + step + 1
                if math.isfinite(loss):
                    job.reporter.log_step(done, float(loss), float(penalty), self.decay.weight, alive, of)
            stopping = self.update.stopping(self.stop.requested)
            if step + 1 < self.steps and (stopping or self._is_due()):
                # A state that cannot be gone on from is not to replace one that can.
                self.update.look(epoch, step)
                place.seconds = time.perf_counter() - began
                place.remember(generator, job.device)
                self._save()
                if stopping:
                    self._stop(f"step {step + 1} of epoch {epoch + 1}")
        _flush(self.model)
        self.gates.record()
        if job.stage == "train" and (warning := self.gates.warning()):
            job.reporter.info(f"train: {warning}")
        cut = self._shrink(epoch) if due else None
        assert_identical_models(self.model, f"the models that epoch {epoch + 1} has left")
        *totals, counted = place.sums.tolist()
        if not counted:
            raise TrainingError(
                f"every step of epoch {epoch + 1} of {job.stage} was skipped; try a lower lr or decay.weight"
            )
        skipped = self.steps - round(counted)
        alive, of = self.gates.count()
        return {
            "stage": job.stage,
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps,
            "loss": totals[0] / counted,
            "penalty": totals[1] / counted,
            "lambda": self.decay.weight,
            "lr": job.section.lr * factor,
            "alive": alive,
            "of": of,
            **(job.steering.figures() if job.steering is not None else {}),
            **({"shrunk": {key: cut.record[key] for key in ("channels", "params", "macs")}} if cut else {}),
            **({"skipped": skipped} if skipped else {}),
            "metrics": self._metrics(),
            "seconds": time.perf_counter() - began,
        }

    def _metrics(self) -> dict[str, float]:
        """Those of the model that the training would end with now; process 0 measures."""
        if not distributed.is_main_process():
            return {}
        model = self.model if self.average is None else self.average.model
        return self.job.task.quick(model, self.job.val, 4 * self.batch)

    def _steer(self, epoch: int, step: int) -> None:
        """Let λ follow the model, where it is time to look."""
        steering = self.job.steering
        if steering is not None and step % steering.every(self.total) == 0:
            loss, _, counted = self.place.sums.tolist()
            before, told = self.place.told
            recent = (loss - before) / (counted - told) if counted > told else None
            self.place.told = loss, counted
            self.decay.weight = steering.look(float(self.way[epoch * self.steps + step] / self.way[-1]), recent)

    def _batches(
        self, epoch: int, step: int, order: Tensor, where: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of this process in one step. All processes go through one order, and where a step has
        several, each draws its numbers by itself, so that they are the same whoever takes it."""
        train, shares = self.train, self.update.shares
        for number in range(distributed.rank(), shares, distributed.world_size()):
            if shares > 1:
                generator = seeded_generator(self.job.seed, self.job.stage, epoch, step, number)
            start = (step * shares + number) * self.batch
            part = slice(start, start + self.batch)
            rows = where[part]
            yield self.augment(train.images[rows], train.targets[rows], train.sizes[order[part]], generator)

    def _is_due(self) -> bool:
        """Whether it is time to write a state."""
        section, done = self.job.section.checkpoint, self.place.epoch * self.steps + self.place.step
        by_steps = section.steps is not None and done % section.steps == 0
        by_time = section.minutes is not None and time.monotonic() - self.saved >= 60 * section.minutes
        return by_steps or by_time

    def _save(self) -> None:
        save_state(self.model, self.optimizer, self.gates, self.job, self.place, self.steps, self.average)
        self.saved = time.monotonic()

    def _stop(self, where: str) -> None:
        self.job.reporter.info(f"{self.job.stage}: stopped behind {where}, its state is saved")
        raise KeyboardInterrupt

    def _rate(self, metrics: Mapping[str, float]) -> None:
        """See whether the state that is written next is the best so far."""
        task, place = self.job.task, self.place
        main = task.metric_names[0]
        if main in metrics:
            score = -metrics[main] if main in task.lower_is_better else metrics[main]
            place.best = max(filter(None, [place.best, (score, place.epoch * self.steps)]))

    def _shrink(self, epoch: int) -> Cut | None:
        """Cut what is dead, and go on with what is left."""
        self.watching.close()
        cut = self.job.shrinking.cut(self.model, self.groups, self.decay, epoch + 1)
        if cut is not None:
            self._go_on(cut)
        self._watch()
        return cut

    def _go_on(self, cut: Cut) -> None:
        """What trains the model that a cut has left of this one is made anew, and told what the one before knew."""
        self._reshape(cut.model, cut.groups)
        held = slim_optimizer(self.optimizer, self.model, cut.model, self.groups, cut.plan).state
        # In the order of parameters in which a run that goes on from a checkpoint makes it.
        made = _optimizer(cut.model, self.job, self.decay)
        for group in made.param_groups:
            made.state.update({p: held[p] for p in group["params"] if p in held})
        self.model, self.groups = cut.model, cut.groups
        self._equip(made)

    def _reshape(self, model: nn.Module, groups: list[Group]) -> None:
        shrinking = self.job.shrinking
        self.decay, self.job.steering = shrinking.equipped(model, groups, self.job.steering)
        self.gates.follow(model, groups, shrinking.places(self.gates.norms))

    def _equip(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.update = TrainingStep(self.model, optimizer, self.job, self.job.section.accumulate)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        # A cut begins the mean anew: what was cut is not to be averaged with what is left.
        ema = self.job.section.ema
        self.average = None if ema is None else WeightAverage(self.model, ema)

    def _watch(self) -> None:
        """Enter everything that holds on to the model and the decay that are under training now."""
        self.watching.enter_context(self.decay)
        self.forward = self.watching.enter_context(
            fast_steps(self.model, self.groups, self.job.section, self.job.reporter.info)
        )
        if self.job.section.sync_norms and distributed.world_size() > 1:
            self.watching.enter_context(sync_batch_norms(self.model))


def seeded_generator(seed: int, stage: str, epoch: int, *within: int) -> torch.Generator:
    """The generator of one epoch, or of a place within it; torch's global one is seeded alike, for models that draw
    numbers themselves."""
    name = "/".join(map(str, (seed, stage, epoch, *within)))
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


def bind_options(table: registry.Registry, component: Component) -> Callable[..., Any]:
    """The builder that a recipe names, with the recipe's options."""
    return functools.partial(table.get(component.name), **component.options)


def _optimizer(model: nn.Module, job: TrainingJob, decay: Decay) -> torch.optim.Optimizer:
    section = job.section
    return bind_options(registry.optimizers, section.optimizer)(
        param_groups(model, section.lr, section.gate_lr, decay.norms)
    )


@torch.no_grad()
def _flush(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.masked_fill_(parameter.abs() < FLUSH, 0.0)
