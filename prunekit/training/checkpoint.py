"""The state of a training in its run folder: all that it needs to go on as if it had not been stopped.

Between two epochs that is the model and the mean of its weights, the optimiser, the gates' course, λ and what was cut.
Within an epoch it is also how far that has come, what it has summed up, what the shrinking has seen, and the random
generators.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import CheckpointError, TrainingError
from prunekit.pruning.sparsity.decay import Decay
from prunekit.runs.stage_order import STAGES
from prunekit.runs.stage_order import training_position as stage_place
from prunekit.training.ema import WeightAverage
from prunekit.training.gate_history import GateHistory
from prunekit.training.job import TrainingJob
from prunekit.utils import distributed

# Tensors and the rest, as RunDir.load_checkpoint gives them.
Found = tuple[dict[str, np.ndarray], dict[str, Any]]


@dataclass
class TrainingPosition:
    """Where a training stands between two steps.

    Attributes:
        epoch: how many are done.
        step: how many steps of the next one are done.
        sums: of loss and penalty over those of them that counted, and how many did, float64 [3].
        told: the sum of losses, and how many there were, when λ was looked at last.
        seconds: which those have taken.
        best: the best figure of validation so far, the more the better, and the number of the state that has it.
        random: the states of the random generators behind the last step; empty between two epochs, since each epoch
            seeds its own.
    """

    epoch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    told: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    best: tuple[float, int] | None = None
    random: dict[str, Tensor] = field(default_factory=dict)

    def remember(self, generator: torch.Generator, device: torch.device) -> None:
        """Take down the states of the epoch's generator and of torch's own."""
        self.random = {"epoch": generator.get_state(), "torch": torch.get_rng_state()}
        if device.type != "cpu":
            self.random["device"] = torch.get_device_module(device).get_rng_state(device)

    def remind(self, generator: torch.Generator, device: torch.device) -> None:
        """Put the generators where they stood."""
        generator.set_state(self.random["epoch"])
        torch.set_rng_state(self.random["torch"])
        # A training that began without the accelerator has drawn nothing there.
        if device.type != "cpu" and "device" in self.random:
            torch.get_device_module(device).set_rng_state(self.random["device"], device)


def save_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gates: GateHistory,
    job: TrainingJob,
    place: TrainingPosition,
    steps: int,
    average: WeightAverage | None = None,
) -> None:
    """Write the state at ``place`` into the run folder, in a training of so many steps an epoch.

    Raises:
        TrainingError: the optimiser keeps what is neither tensor nor number.
        CheckpointError: the system refused; the states written before still stand.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.state().items()}
    held, numbers = optimizer.state_dict(), {}
    for index, state in held["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            elif value is None or isinstance(value, (bool, int, float)):
                numbers[f"{index}/{key}"] = value
            else:
                raise TrainingError(
                    f"the optimiser {job.section.optimizer.name} keeps a {type(value).__name__} ({key}) for a "
                    "parameter, which no training state can hold; let it keep tensors and numbers, or take another"
                )
    tensors |= {f"random/{name}": value for name, value in place.random.items()}
    arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    arrays |= {f"gates/{name}": rows for name, rows in gates.arrays().items()}
    if place.step and job.shrinking is not None:
        arrays |= {f"looks/{name}": heights for name, heights in job.shrinking.seen().items()}
    state = {
        "epoch": place.epoch,
        "step": place.step,
        "steps": steps,
        "batches": job.section.accumulate * distributed.world_size(),
        "sums": place.sums.tolist(),
        "told": place.told,
        "seconds": place.seconds,
        "best": place.best,
        "averaged": 0 if average is None else average.steps,
        "optimizer": numbers,
        # What an optimiser counts by itself, such as schedule-free ones do, stands beside the rates.
        "shares": [
            {k: v for k, v in group.items() if isinstance(v, (bool, int, float))} for group in held["param_groups"]
        ],
    }
    parts = {"steering": job.steering, "shrinking": job.shrinking}
    state |= {name: part.state() for name, part in parts.items() if part is not None}
    for name, values in arrays.items():
        # How high a gate stood that decides nothing is ∞.
        if values.dtype.kind == "f" and not name.startswith("looks/") and not np.isfinite(values).all():
            what = name.partition("/")[2]
            raise TrainingError(
                f"{what} is not finite behind {place.epoch} epochs and {place.step} steps, so this state is not kept; "
                "try a lower train.lr or decay.weight"
            )
    section, number = job.section.checkpoint, place.epoch * steps + place.step
    best = place.best[1] if section.best and place.best is not None else None
    job.run.save_checkpoint(job.stage, number, arrays, state, section.keep, best)


def restore_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gates: GateHistory,
    job: TrainingJob,
    decay: Decay,
    steps: int,
    found: Found | None,
    average: WeightAverage | None = None,
) -> TrainingPosition:
    """Load a training state, where there is one; where the training stands. States of earlier prunekits stand between
    two epochs, and say no more than which.

    Raises:
        CheckpointError: it does not fit the model, or the data.
    """
    if found is None:
        return TrainingPosition()
    arrays, state = found
    if state.get("steps", steps) != steps:
        raise CheckpointError(
            f"{_named(job)} is of a training of {state['steps']} steps an epoch, and the data now give {steps}; put "
            f"back what is missing of them, or {_again(job)}"
        )
    kinds = ("model", "average", "optimizer", "gates", "looks", "random")
    parts: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = value if kind in ("gates", "looks") else torch.from_numpy(value.copy())
    moments: dict[int, dict[str, Any]] = {}
    for name, value in {**parts["optimizer"], **state.get("optimizer", {})}.items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = value
    made = optimizer.state_dict()["param_groups"]
    counts = state.get("shares", [{}] * len(made))
    try:
        model.load_state_dict(parts["model"])
        if average is not None:
            average.load(parts["average"], state["averaged"])
        shares = [{**ours, **theirs} for ours, theirs in zip(made, counts, strict=True)]
        optimizer.load_state_dict({"param_groups": shares, "state": moments})
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{_named(job)} does not fit the model ({reason}); {_again(job)}") from error
    gates.load(parts["gates"])
    if job.steering is not None and state.get("steering") is not None:
        decay.weight = job.steering.load(state["steering"])
    place = TrainingPosition(int(state["epoch"]))
    if state.get("best") is not None:
        place.best = (float(state["best"][0]), int(state["best"][1]))
    if state.get("step"):
        place.step, place.told, place.seconds = int(state["step"]), tuple(state["told"]), state["seconds"]
        place.sums, place.random = torch.tensor(state["sums"], dtype=torch.float64), parts["random"]
        if job.shrinking is not None:
            job.shrinking.begin(parts["looks"])
    return place


def split_batches(job: TrainingJob, found: Found | None) -> TrainingJob:
    """The job of this process: what was begun with so many batches a step goes on with as many, shared among the
    processes that there are now. That gives what it would have given, but for rounding.

    Raises:
        CheckpointError: these processes cannot share them evenly.
    """
    count, accumulate = distributed.world_size(), job.section.accumulate
    batches = accumulate * count if found is None else int(found[1].get("batches", 1))
    if batches == accumulate * count:
        return job
    if batches % count:
        fit = " or ".join(str(n) for n in range(1, batches + 1) if batches % n == 0)
        raise CheckpointError(
            f"{_named(job)} is of steps of {batches} batches, which {count} processes cannot share; go on with {fit}, "
            f"or {_again(job)}"
        )
    job.reporter.info(
        f"{job.stage}: begun with {batches} {'batches' if batches > 1 else 'batch'} a step; each of "
        f"{count} {'processes takes' if count > 1 else 'process takes'} {batches // count}"
    )
    section = job.section.model_copy(update={"accumulate": batches // count})
    return replace(job, section=section)


def _named(job: TrainingJob) -> str:
    return f"the training state of {job.stage} in {job.run.path}"


def _again(job: TrainingJob) -> str:
    return f"start the stage again with --from {STAGES[stage_place(job.stage)[0]]}"
