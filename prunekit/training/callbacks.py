"""Callbacks of the training loop: learning rate, gradual pruning, metrics, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prunekit.training.checkpoint import save_checkpoint
from prunekit.training.step import StepResult

if TYPE_CHECKING:
    from prunekit.training.trainer import Trainer


class Callback:
    """Hooks that the trainer calls, in the order of its ``callbacks``; a subclass overrides those it needs.

    In step hooks, ``trainer.position`` counts the finished steps. In ``on_epoch_logged`` it is the start of the next
    epoch.
    """

    def on_step_start(self, trainer: Trainer) -> None:
        """Called before each step."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Called after each step."""

    def on_epoch_end(self, trainer: Trainer) -> dict[str, Any]:
        """Called after the last step of an epoch and before validation; returns entries for the metrics row."""
        return {}

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Called after validation with the metrics row of the epoch."""


class LearningRate(Callback):
    """Sets the learning rates by the recipe's schedule."""

    def __init__(self, schedule: Callable[[float], float]):
        self.schedule = schedule
        self.factor = 1.0

    def on_step_start(self, trainer: Trainer) -> None:
        self.factor = self.schedule(trainer.done / trainer.phases.total)
        for group, lr in zip(trainer.optimizer.param_groups, trainer.base_lrs, strict=True):
            group["lr"] = lr * self.factor

    def on_epoch_end(self, trainer: Trainer) -> dict[str, Any]:
        return {"lr": trainer.job.config.lr * self.factor}


class PruneGradually(Callback):
    """Shrinks the chosen channels after each step; the decay ends when the first are chosen.

    With ``stop_before_pruning``, the training stops before the step after which they would be.
    """

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.gradual_pruning.step(trainer.phases.parts_of_a_step(trainer.position.epoch)):
            trainer.end_decay()
        trainer.reached_pruning = trainer.job.stop_before_pruning and trainer.prunes_next


class MetricsLogger(Callback):
    """Appends the row of each epoch to ``metrics.jsonl`` and passes it to the tracker.

    Runs before :class:`Checkpointing`: a row without its checkpoint is dropped and written again on resume, but a
    checkpoint without its row would leave a gap.
    """

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        trainer.track(row)
        trainer.job.run.append_metrics(row)


class Checkpointing(Callback):
    """Saves checkpoints by epochs, steps and minutes; after Ctrl-C or SIGTERM saves one and stops the training."""

    def __init__(self) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        position = trainer.position
        stop = trainer.should_stop()
        if position.step < trainer.phase.steps and (stop or self._is_due(trainer)):
            trainer.check_finite()  # a checkpoint with bad numbers must not replace a good one
            position.seconds = time.perf_counter() - trainer.epoch_started
            position.save_rng(trainer.generator, trainer.job.device)
            self.save(trainer)
            if stop:
                trainer.stopped_at = f"step {position.step} of epoch {position.epoch + 1}"

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        position = trainer.position
        stop = trainer.should_stop()
        every = position.epoch == trainer.epochs or position.epoch % trainer.job.config.checkpoint.every == 0
        if stop or every or self._is_due(trainer):
            self._update_best(trainer, row["metrics"])
            self.save(trainer)
        if stop:
            trainer.stopped_at = f"epoch {position.epoch}"

    def save(self, trainer: Trainer) -> None:
        save_checkpoint(trainer)
        self.saved_at = time.monotonic()

    def _is_due(self, trainer: Trainer) -> bool:
        config = trainer.job.config.checkpoint
        by_steps = config.steps is not None and trainer.global_step % config.steps == 0
        return by_steps or (config.minutes is not None and time.monotonic() - self.saved_at >= 60 * config.minutes)

    @staticmethod
    def _update_best(trainer: Trainer, metrics: dict[str, float]) -> None:
        task, position = trainer.job.task, trainer.position
        name = task.metric_names[0]
        if name in metrics:
            score = -metrics[name] if name in task.lower_is_better else metrics[name]
            position.best = max(filter(None, [position.best, (score, trainer.global_step)]))


class Progress(Callback):
    """Reports steps and epochs to the terminal and the log."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.is_log_step and math.isfinite(result.loss):
            losses = float(result.loss), float(result.penalty)
            trainer.job.reporter.log_step(trainer.done, *losses, trainer.decay.weight, *trainer.gates.count())

    def on_epoch_logged(self, trainer: Trainer, row: dict[str, Any]) -> None:
        trainer.job.reporter.log_epoch(row)
