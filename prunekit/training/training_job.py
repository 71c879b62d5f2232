"""What one stage of a run trains with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.config.schema import Training
from prunekit.data.datasets import Tensors
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task
from prunekit.training.distillation import TrainingLoss
from prunekit.utils.progress import Reporter

# Number of finished epochs → context manager of a function that logs the metrics row of each later epoch.
Tracker = Callable[[int], AbstractContextManager[Callable[[dict[str, Any]], None]]]


def no_tracker(first_epoch: int) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """A tracker that logs nothing."""
    return nullcontext(lambda row: None)


@dataclass
class TrainingJob:
    """Everything that :class:`~prunekit.training.trainer.Trainer` needs except the model.

    Attributes:
        stage: name of the training in metrics and checkpoints, such as "train" or "finetune".
        config: its section of the recipe.
        task: computes validation metrics.
        loss: of one micro-batch.
        train_data, val_data: data sets in memory, at ``data.size``.
        seed: of the run.
        run: run folder for metrics and checkpoints.
        reporter: receives progress and messages.
        device: of the model.
        threshold: effective gate at or below which a channel counts as dead.
        resized: returns the training data at another size; needed for ``progressive.sizes``.
        gradual_pruning: given the number of steps, returns what shrinks channels to zero; None shrinks none.
        stop_before_pruning: stop with a checkpoint before the first channels are chosen.
        tracker: logs metrics elsewhere, see :mod:`prunekit.training.trackers`.
    """

    stage: str
    config: Training
    task: Task
    loss: TrainingLoss
    train_data: Tensors
    val_data: Tensors
    seed: int
    run: RunDir
    reporter: Reporter
    device: torch.device
    threshold: float = 0.0
    resized: Callable[[int], Tensors] | None = None
    gradual_pruning: Callable[[int], GradualPruning] | None = None
    stop_before_pruning: bool = False
    tracker: Tracker = no_tracker
