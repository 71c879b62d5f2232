"""The state of a training in its run folder: all that it needs to go on as if it had not been stopped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import CheckpointError
from prunekit.gatecourse import GateCourse
from prunekit.job import Job
from prunekit.pruning.decay import Decay

# Tensors and the rest, as RunDir.load_checkpoint gives them.
Found = tuple[dict[str, np.ndarray], dict[str, Any]]


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, gates: GateCourse, job: Job, epoch: int) -> None:
    """Write the state after ``epoch`` into the run folder.

    Raises:
        CheckpointError: the system refused; the states written before still stand.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    arrays |= {f"gates/{name}": rows for name, rows in gates.arrays().items()}
    parts = {"steering": job.steering, "shrinking": job.shrinking}
    state = {"epoch": epoch, **{name: part.state() for name, part in parts.items() if part is not None}}
    job.run.save_checkpoint(job.stage, epoch, arrays, state, job.section.checkpoint.keep)


def restore_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gates: GateCourse,
    job: Job,
    decay: Decay,
    found: Found | None,
) -> int:
    """Load a training state, where there is one; the number of epochs that are done.

    Raises:
        CheckpointError: it does not fit the model.
    """
    if found is None:
        return 0
    arrays, state = found
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "gates": {}}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = value if kind == "gates" else torch.from_numpy(value.copy())
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = value
    try:
        model.load_state_dict(parts["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(
            f"the training state of {job.stage} in {job.run.path} does not fit the model ({reason}); "
            f"start the stage again with --from {job.stage}"
        ) from error
    gates.load(parts["gates"])
    if job.steering is not None and state.get("steering") is not None:
        decay.weight = job.steering.load(state["steering"])
    return int(state["epoch"])
