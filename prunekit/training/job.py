"""What one stage of a run trains, and whom it tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from prunekit.config.schema import Training
from prunekit.data.datasets import Tensors
from prunekit.pruning.sparsity.lambda_controller import LambdaController
from prunekit.pruning.sparsity.progressive import ProgressivePruning
from prunekit.runs.run_dir import RunDir
from prunekit.training.distillation import TrainingLoss


class Reporter(Protocol):
    """What the loop tells while it runs."""

    def start_training(
        self, stage: str, epochs: int, steps: int, first: int, losses: Sequence[float], step: int
    ) -> None: ...

    def log_step(self, done: int, loss: float, penalty: float, weight: float, alive: int, total: int) -> None: ...

    def log_epoch(self, line: dict[str, Any]) -> None: ...

    def end_training(self) -> None: ...

    def info(self, text: str) -> None: ...


# From the number of epochs that are done to what takes the lines of those that follow; see prunekit.training.trackers.
Tracker = Callable[[int], AbstractContextManager[Callable[[dict[str, Any]], None]]]


def no_tracker(first: int) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """A tracker that tracks nothing."""
    return nullcontext(lambda line: None)


@dataclass
class TrainingJob:
    """What one stage trains: everything but the model."""

    stage: str
    section: Training
    task: Any
    criterion: TrainingLoss
    train: Tensors
    val: Tensors
    seed: int
    run: RunDir
    reporter: Reporter
    device: torch.device
    threshold: float = 0.0
    steering: LambdaController | None = None
    tracker: Tracker = no_tracker
    shrinking: ProgressivePruning | None = None
