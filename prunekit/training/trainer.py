"""The training loop for sparse training and fine-tuning.

Each epoch seeds its random generators from (seed, stage, epoch), and a checkpoint within an epoch holds their states,
so a resumed training gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import Component
from prunekit.data.cache import to_device
from prunekit.data.datasets import Tensors
from prunekit.errors import TrainingError
from prunekit.native.library import load
from prunekit.pruning.plan import Group
from prunekit.pruning.sparsity.dynamic_decay import Decay, NoDecay
from prunekit.training import callbacks
from prunekit.training.acceleration import fast_steps, flush_denormals, sync_batch_norms
from prunekit.training.checkpoint import TrainingPosition, restore_checkpoint, split_micro_batches
from prunekit.training.ema import WeightAverage
from prunekit.training.gate_history import GateHistory
from prunekit.training.optimizers import param_groups
from prunekit.training.phases import Phase, Phases
from prunekit.training.step import TrainingStep, assert_identical_models, broadcast_model
from prunekit.training.training_job import TrainingJob, no_tracker
from prunekit.utils import distributed
from prunekit.utils.signals import defer_interrupts

# Smaller weights are set to zero after each epoch: decay would take them to subnormal numbers, which are slow on CPUs.
TINY = 1e-30
LOG_EVERY = 10  # steps; reading the loss and the gates waits for the device


class ReachedPruning(KeyboardInterrupt):
    """A training stopped before gradual pruning, as requested, and has saved a checkpoint."""


class Trainer:
    """Trains a model through one stage; resumes from the newest checkpoint in the run folder.

    Args:
        model: on ``job.device``; trained in place.
        job: what to train with.
        groups: channel groups of the model.
        decay: penalty on the gates.

    Attributes:
        gates: history of the gates.
        position: finished epochs and steps, and the sums of the current epoch.
        callbacks: in the order in which their hooks are called.
        stopped_at: set by a callback to stop the training; where it stopped.
        reached_pruning: set by a callback to stop because of ``job.stop_before_pruning``.

    Raises:
        TrainingError: a loss, penalty or gradient is not finite, or another process of the run has ended.
        CheckpointError: the checkpoint does not fit the model or the data.
    """

    def __init__(self, model: nn.Module, job: TrainingJob, groups: Sequence[Group], decay: Decay):
        checkpoint = job.run.load_checkpoint(job.stage)
        self.job = job = split_micro_batches(job, checkpoint)
        self.model, self.groups, self.decay = model, list(groups), decay
        self.gates = GateHistory(model, groups, job.threshold)
        config = job.config
        self.optimizer = bind_options(registry.optimizers, config.optimizer)(
            param_groups(model, config.lr, config.gate_lr, decay.norms)
        )
        self.training_step = TrainingStep(model, self.optimizer, job, config.accumulate)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = None if config.ema is None else WeightAverage(model, config.ema)

        micro_batches = self.training_step.micro_batches
        self.phases = Phases(config, job.train_data.images.shape[-1], len(job.train_data), micro_batches)
        self.epochs = config.epochs
        self.gradual_pruning = None if job.gradual_pruning is None else job.gradual_pruning(self.phases.total)
        self.position = restore_checkpoint(self, checkpoint)
        if distributed.world_size() > 1 and config.fast and job.device.type == "cpu":
            with distributed.main_process_first():
                load()  # compile once; the other processes find the library
        broadcast_model(self.model)
        if self.ema is not None:
            broadcast_model(self.ema.model)

        schedule = bind_options(registry.schedules, config.schedule)
        self.callbacks: list[callbacks.Callback] = [callbacks.LearningRate(schedule)]
        if self.gradual_pruning is not None:
            self.callbacks.append(callbacks.PruneGradually())
        self.callbacks += [callbacks.MetricsLogger(), callbacks.Checkpointing(), callbacks.Progress()]
        self.stopped_at: str | None = None
        self.reached_pruning = False
        self.data: Tensors | None = None

    @property
    def phase(self) -> Phase:
        """The phase of the current epoch."""
        return self.phases.at(self.position.epoch)

    @property
    def global_step(self) -> int:
        """Finished steps of all epochs."""
        return self.phases.steps_before(self.position.epoch) + self.position.step

    @property
    def done(self) -> int:
        """How far the training is, of ``phases.total``."""
        return self.phases.done(self.position.epoch, self.position.step)

    @property
    def prunes_next(self) -> bool:
        """Whether the next step is followed by the choice of channels, or an earlier one was."""
        pruning, position = self.gradual_pruning, self.position
        if pruning is None:
            return False
        epoch = position.epoch + (position.step == self.phase.steps)
        return pruning.round > 0 or pruning.begins_with(self.phases.parts_of_a_step(epoch))

    @property
    def is_log_step(self) -> bool:
        """Whether losses and gates are read after the step that has just finished."""
        step = self.position.step
        return (step - 1) % LOG_EVERY == 0 or step == self.phase.steps

    def fit(self) -> None:
        """Train the model to the last epoch."""
        if self.job.stop_before_pruning and self.prunes_next:
            state = "has begun" if self.gradual_pruning.round else "begins next"
            self.job.reporter.info(f"{self.job.stage}: gradual pruning {state}")
            raise ReachedPruning
        with self._session():
            for epoch in range(self.position.epoch, self.epochs):
                self._start_epoch()
                for _ in range(self.position.step, self.phase.steps):
                    self._notify("on_step_start")
                    result = self.training_step(self.forward, self.decay, self._micro_batches())
                    if self.ema is not None:
                        self.ema.update(self.model)
                    self.position.advance(result)
                    if self.training_step.failed or self.is_log_step:
                        self.check_finite()
                    self._notify("on_step_end", result)
                    self._stop_if_requested()
                row = self._end_epoch()
                self.position = TrainingPosition(epoch + 1, best=self.position.best)
                self._notify("on_epoch_logged", row)
                self._stop_if_requested()
        if self.ema is not None and self.ema.steps:
            self.ema.copy_to(self.model)
            _zero_tiny_weights(self.model)
        self.job.run.record_skipped_steps(self.job.stage)
        if self.job.stage == "train":
            self.job.run.write_arrays("gates.npz", self.gates.arrays())

    def check_finite(self) -> None:
        """Raise TrainingError or report skipped steps if a step since the last check was not finite."""
        self.training_step.check(self.position.epoch, self.position.step - 1)

    def should_stop(self) -> bool:
        """Whether Ctrl-C, SIGTERM or the job asks to stop; the same in all processes. Call once per step and epoch."""
        return self.training_step.should_stop(self.interrupts.requested or self.reached_pruning)

    def end_decay(self) -> None:
        """Train without a penalty from now on."""
        self.decay.__exit__(None, None, None)
        self.decay = NoDecay(self.model, self.groups)

    @contextmanager
    def _session(self) -> Iterator[None]:
        job, first = self.job, self.position.epoch
        finished = first >= self.epochs
        if not finished:
            job.run.truncate_metrics(job.stage, first)
        losses = [row["loss"] for row in job.run.read_metrics() if row["stage"] == job.stage]
        # Counted as ``done``, since epochs may have different numbers of steps.
        per_epoch, step = self.phases.done(1, 0), self.done - self.phases.done(first, 0)
        costs = [self.phases.at(epoch).size ** 2 for epoch in range(self.epochs)]
        job.reporter.start_training(job.stage, self.epochs, per_epoch, first, losses, step, costs)
        # A tracker drops what was logged after ``first``, which must stay when there is nothing to train.
        tracker = no_tracker if finished else job.tracker
        synchronized = job.config.sync_norms and distributed.world_size() > 1
        try:
            with (
                defer_interrupts() as self.interrupts,
                flush_denormals(),
                tracker(first) as self.track,
                self.decay,
                fast_steps(self.model, self.groups, job.config, job.reporter.info) as self.forward,
                sync_batch_norms(self.model) if synchronized else nullcontext(),
            ):
                yield
        finally:
            job.reporter.end_training()

    def _start_epoch(self) -> None:
        job, position = self.job, self.position
        self.epoch_started = time.perf_counter() - position.seconds
        self._start_phase()
        self.generator = seeded_generator(job.seed, job.stage, position.epoch)
        self.order = torch.randperm(len(self.data), generator=self.generator)
        self.order_on_device = self.order.to(self.data.images.device)
        position.sums = position.sums.to(job.device)
        if position.step:
            position.restore_rng(self.generator, job.device)
        self.model.train()

    def _start_phase(self) -> None:
        """Load the data of the current size, unless they are there, and set the strength of the augmentation."""
        job, phase, augment = self.job, self.phase, self.job.config.augment
        if self.data is None or self.data.images.shape[-1] != phase.size:
            if job.config.progressive.sizes:
                where = f"from epoch {self.position.epoch + 1} on"
                job.reporter.info(
                    f"{job.stage}: images of {phase.size}×{phase.size} in batches of {phase.batch_size} {where}"
                )
            self.data = None  # first, for the memory of the device
            full = phase.size == job.train_data.images.shape[-1]
            self.data = to_device(job.train_data if full else job.resized(phase.size), job.device)
        if phase.strength is not None:
            strength = phase.strength * augment.options.get("strength", 1.0)
            augment = augment.model_copy(update={"options": {**augment.options, "strength": strength}})
        self.augment = bind_options(registry.augmentations, augment)

    def _end_epoch(self) -> dict[str, Any]:
        """Finish an epoch; return its row of ``metrics.jsonl``."""
        job, position = self.job, self.position
        _zero_tiny_weights(self.model)
        self.gates.record()
        if job.stage == "train" and (warning := self.gates.warning()):
            job.reporter.info(f"train: {warning}")
        entries: dict[str, Any] = {}
        for callback in self.callbacks:
            entries |= callback.on_epoch_end(self)
        assert_identical_models(self.model, f"the models after epoch {position.epoch + 1}")
        loss, penalty, steps = position.sums.tolist()
        if not steps:
            raise TrainingError(
                f"every step of epoch {position.epoch + 1} of {job.stage} was skipped; try a lower lr or decay.weight"
            )
        if skipped := self.phase.steps - round(steps):
            entries["skipped"] = skipped
        alive, of = self.gates.count()
        return {
            "stage": job.stage,
            "epoch": position.epoch + 1,
            "step": self.global_step,
            **({"size": self.phase.size} if job.config.progressive.sizes else {}),
            "loss": loss / steps,
            "penalty": penalty / steps,
            "lambda": self.decay.weight,
            "alive": alive,
            "of": of,
            **entries,
            "metrics": self._validate(),
            "seconds": time.perf_counter() - self.epoch_started,
        }

    def _validate(self) -> dict[str, float]:
        """Validation metrics of the model that the training would end with now, in the main process and where due."""
        epoch = self.position.epoch + 1
        is_due = epoch % self.job.config.validate_every == 0 or epoch == self.epochs
        if not (is_due and distributed.is_main_process()):
            return {}
        model = self.model if self.ema is None else self.ema.model
        return self.job.task.validate(model, self.job.val_data, 4 * self.phases.last.batch_size)

    def _micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's micro-batches of one step: augmented images and targets.

        All processes share one order of the data. Where a step has several micro-batches, each has its own generator,
        so its random numbers do not depend on which process takes it.
        """
        data, step, count, generator = self.data, self.position.step, self.training_step.micro_batches, self.generator
        for index in range(distributed.rank(), count, distributed.world_size()):
            if count > 1:
                generator = seeded_generator(self.job.seed, self.job.stage, self.position.epoch, step, index)
            start = (step * count + index) * self.phase.batch_size
            batch = slice(start, start + self.phase.batch_size)
            rows = self.order_on_device[batch]
            yield self.augment(data.images[rows], data.targets[rows], data.sizes[self.order[batch]], generator)

    def _notify(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def _stop_if_requested(self) -> None:
        if self.stopped_at is not None:
            self.job.reporter.info(f"{self.job.stage}: stopped after {self.stopped_at}; checkpoint saved")
            raise ReachedPruning if self.reached_pruning else KeyboardInterrupt


def seeded_generator(seed: int, stage: str, epoch: int, *within: int) -> torch.Generator:
    """Return the generator of an epoch, or of a step and micro-batch within it; seed torch's global generator alike."""
    name = "/".join(map(str, (seed, stage, epoch, *within)))
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


def bind_options(table: registry.Registry, component: Component) -> Callable[..., Any]:
    """Return the builder that a recipe names, with the recipe's options bound."""
    return functools.partial(table.get(component.name), **component.options)


@torch.no_grad()
def _zero_tiny_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.masked_fill_(parameter.abs() < TINY, 0.0)
