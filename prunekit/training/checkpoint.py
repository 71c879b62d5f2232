"""Training checkpoints: everything needed to resume as if the training had not been interrupted.

Between epochs: model, weight average, optimizer, gate history and λ control. Within an epoch also the position, running
sums and the random generators.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import CheckpointError, TrainingError
from prunekit.runs.stage_order import STAGES, training_position
from prunekit.training.step import StepResult
from prunekit.training.training_job import TrainingJob
from prunekit.utils import distributed

if TYPE_CHECKING:
    from prunekit.training.trainer import Trainer

# Tensors and JSON values, as RunDir.load_checkpoint returns them.
Checkpoint = tuple[dict[str, np.ndarray], dict[str, Any]]


@dataclass
class TrainingPosition:
    """How far a training is, between two steps.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the next epoch.
        sums: loss, penalty and number of its steps that were finite, float64 (3,).
        seconds: duration of these steps.
        best: best validation score so far, larger is better, and the number of its checkpoint.
        rng_states: of the random generators after the last step; empty between epochs, since each epoch seeds them.
    """

    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    seconds: float = 0.0
    best: tuple[float, int] | None = None
    rng_states: dict[str, Tensor] = field(default_factory=dict)

    def advance(self, result: StepResult) -> None:
        """Count one more step; add its losses to the sums if it was finite."""
        values = torch.stack([result.loss, result.penalty, torch.ones_like(result.loss)])
        self.sums += torch.where(result.finite, values, 0.0)
        self.step += 1

    def save_rng(self, generator: torch.Generator, device: torch.device) -> None:
        """Store the states of the epoch's generator and of torch's global ones."""
        self.rng_states = {"epoch": generator.get_state(), "torch": torch.get_rng_state()}
        if device.type != "cpu":
            self.rng_states["device"] = torch.get_device_module(device).get_rng_state(device)

    def restore_rng(self, generator: torch.Generator, device: torch.device) -> None:
        """Set the generators to the stored states."""
        generator.set_state(self.rng_states["epoch"])
        torch.set_rng_state(self.rng_states["torch"])
        # Absent where the training began on a CPU.
        if device.type != "cpu" and "device" in self.rng_states:
            torch.get_device_module(device).set_rng_state(self.rng_states["device"], device)


def save_checkpoint(trainer: Trainer) -> None:
    """Write a checkpoint of a training into its run folder.

    Raises:
        TrainingError: a tensor is not finite, or the optimizer keeps something else than tensors and numbers.
        CheckpointError: the file system failed; earlier checkpoints are unchanged.
    """
    job, position, ema = trainer.job, trainer.position, trainer.ema
    tensors = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    if ema is not None:
        tensors |= {f"average/{name}": value for name, value in ema.state().items()}
    optimizer, numbers = trainer.optimizer.state_dict(), {}
    for index, state in optimizer["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            elif value is None or isinstance(value, (bool, int, float)):
                numbers[f"{index}/{key}"] = value
            else:
                raise TrainingError(
                    f"the optimizer {job.config.optimizer.name} keeps a {type(value).__name__} ({key}) for a "
                    "parameter, which a checkpoint cannot hold; use an optimizer that keeps tensors and numbers"
                )
    tensors |= {f"random/{name}": value for name, value in position.rng_states.items()}
    arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    arrays |= {f"gates/{name}": history for name, history in trainer.gates.arrays().items()}
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise TrainingError(
                f"{name.partition('/')[2]} is not finite after {position.epoch} epochs and {position.step} steps, so "
                "no checkpoint is saved; try a lower train.lr or decay.weight"
            )
    state = {
        "epoch": position.epoch,
        "step": position.step,
        "steps": trainer.phases.at(position.epoch).steps,
        "batches": job.config.accumulate * distributed.world_size(),
        "sums": position.sums.tolist(),
        "seconds": position.seconds,
        "best": position.best,
        "ema_steps": 0 if ema is None else ema.steps,
        "optimizer": numbers,
        # Some optimizers, such as schedule-free ones, keep counters beside the learning rates.
        "param_groups": [
            {k: v for k, v in group.items() if isinstance(v, (bool, int, float))} for group in optimizer["param_groups"]
        ],
    }
    if trainer.gradual_pruning is not None:
        state["gradual_pruning"] = trainer.gradual_pruning.state_dict()
    config = job.config.checkpoint
    best = position.best[1] if config.best and position.best is not None else None
    job.run.save_checkpoint(job.stage, trainer.global_step, arrays, state, config.keep, best)


def restore_checkpoint(trainer: Trainer, checkpoint: Checkpoint | None) -> TrainingPosition:
    """Load a checkpoint into a trainer; return its position, or that of the start without a checkpoint.

    Checkpoints of early versions are between epochs and hold only the number of epochs beside the tensors.

    Raises:
        CheckpointError: it does not fit the model or the data.
    """
    if checkpoint is None:
        return TrainingPosition()
    arrays, state = checkpoint
    job, steps = trainer.job, trainer.phases.at(int(state["epoch"])).steps
    if state.get("steps", steps) != steps:
        raise CheckpointError(
            f"{_name(job)} has {state['steps']} steps an epoch, and the data now give {steps}; restore the missing "
            f"data, or {_restart(job)}"
        )
    kinds = ("model", "average", "optimizer", "gates", "random")
    parts: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for name, value in arrays.items():
        kind, _, key = name.partition("/")
        parts[kind][key] = value if kind == "gates" else torch.from_numpy(value.copy())
    optimizer_state: dict[int, dict[str, Any]] = {}
    for name, value in {**parts["optimizer"], **state.get("optimizer", {})}.items():
        index, _, key = name.partition("/")
        optimizer_state.setdefault(int(index), {})[key] = value
    groups = trainer.optimizer.state_dict()["param_groups"]
    try:
        trainer.model.load_state_dict(parts["model"])
        if trainer.ema is not None:
            trainer.ema.load(parts["average"], state["ema_steps"])
        saved_groups = state.get("param_groups", [{}] * len(groups))
        groups = [{**group, **saved} for group, saved in zip(groups, saved_groups, strict=True)]
        trainer.optimizer.load_state_dict({"param_groups": groups, "state": optimizer_state})
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{_name(job)} does not fit the model ({reason}); {_restart(job)}") from error
    trainer.gates.load(parts["gates"])
    if trainer.gradual_pruning is not None and state.get("gradual_pruning") is not None:
        trainer.gradual_pruning.load_state_dict(state["gradual_pruning"])
        if trainer.gradual_pruning.round:
            trainer.end_decay()
    position = TrainingPosition(int(state["epoch"]))
    if state.get("best") is not None:
        position.best = (float(state["best"][0]), int(state["best"][1]))
    if state.get("step"):
        position.step, position.seconds = int(state["step"]), state["seconds"]
        position.sums, position.rng_states = torch.tensor(state["sums"], dtype=torch.float64), parts["random"]
    return position


def split_micro_batches(job: TrainingJob, checkpoint: Checkpoint | None) -> TrainingJob:
    """Return the job with as many micro-batches a step, over all processes, as the training was started with.

    Raises:
        CheckpointError: they cannot be divided evenly among the processes.
    """
    processes, accumulate = distributed.world_size(), job.config.accumulate
    total = accumulate * processes if checkpoint is None else int(checkpoint[1].get("batches", 1))
    if total == accumulate * processes:
        return job
    if total % processes:
        divisors = " or ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise CheckpointError(
            f"{_name(job)} has {total} batches a step, which {processes} processes cannot share evenly; resume with "
            f"{divisors}, or {_restart(job)}"
        )
    each = total // processes
    job.reporter.info(f"{job.stage}: started with {total} batches a step; accumulating {each} in each process")
    return replace(job, config=job.config.model_copy(update={"accumulate": each}))


def _name(job: TrainingJob) -> str:
    return f"the checkpoint of {job.stage} in {job.run.path}"


def _restart(job: TrainingJob) -> str:
    return f"restart the stage with --from {STAGES[training_position(job.stage)[0]]}"
