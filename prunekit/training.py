"""One training loop, for sparse training and for fine-tuning.

Nothing random is carried from step to step: every epoch seeds its generators from (seed, stage, epoch). So a run that
goes on from the state after some epoch does what it would have done without the stop.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from prunekit import registry
from prunekit.data.cache import resident
from prunekit.data.pairs import Tensors, normalise
from prunekit.errors import CheckpointError, TrainingError
from prunekit.optimizers import shares
from prunekit.plan import Group
from prunekit.pruning.decay import Decay
from prunekit.pruning.life import effective_gates, scores
from prunekit.pruning.optimizer_state import slim_optimizer
from prunekit.pruning.shrinking import Cut, Shrinking
from prunekit.pruning.steering import Steering
from prunekit.rundir import RunDir
from prunekit.schema import Named, Training
from prunekit.stepping import Forward, fast_steps, flushed_denormals

# Below this a parameter is set to zero after each epoch. Decay leaves numbers on their way to zero; past 1e-38 they are
# subnormal, and a processor takes many times as long for each.
FLUSH = 1e-30
LOOK_EVERY = 10  # steps between two looks at loss and gates: a look waits for the device


class Reporter(Protocol):
    """What the loop tells while it runs."""

    def start(self, stage: str, epochs: int, steps: int, first: int, losses: Sequence[float]) -> None: ...

    def step(self, done: int, loss: float, penalty: float, weight: float, alive: int, of: int) -> None: ...

    def epoch(self, line: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...

    def say(self, text: str) -> None: ...


# From the number of epochs that are done to what takes the lines of those that follow; see prunekit.trackers.
Tracker = Callable[[int], AbstractContextManager[Callable[[dict[str, Any]], None]]]


def untracked(first: int) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """A tracker that tracks nothing."""
    return nullcontext(lambda line: None)


@dataclass
class Job:
    """What one stage trains: everything but the model."""

    stage: str
    section: Training
    task: Any
    train: Tensors
    val: Tensors
    seed: int
    run: RunDir
    reporter: Reporter
    device: torch.device
    threshold: float = 0.0
    steering: Steering | None = None
    tracker: Tracker = untracked
    shrinking: Shrinking | None = None


def fit(model: nn.Module, job: Job, groups: Sequence[Group], decay: Decay) -> nn.Module:
    """Train a model in place; goes on from the newest training state in the run folder where there is one.

    Args:
        model: on ``job.device``.
        groups: of the model, for the count of living channels and the record of gates.
        decay: what drives the gates; see ``pruning.decay``.

    Returns:
        the model; with ``job.shrinking`` it is another one, once something has been cut.

    Raises:
        PlanError: the optimiser keeps what cannot be cut with its parameters.
        TrainingError: loss or penalty is not finite; says epoch, step and which.
        CheckpointError: the training state does not fit the model.
    """
    section, shrinking = job.section, job.shrinking
    gates = _Gates(model, groups, job.threshold)
    found = job.run.load_checkpoint(job.stage)
    if shrinking is not None and found is not None:
        groups = shrinking.restore(model, groups, found[1]["shrinking"])
        if shrinking.plan is not None:
            decay = _reshaped(model, groups, gates, job)
    optimizer = _optimizer(model, job, decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = chosen(registry.schedules, section.schedule)
    augment = chosen(registry.augmentations, section.augment)
    batch = min(section.batch_size, len(job.train))
    steps = len(job.train) // batch
    first = _restore(model, optimizer, gates, job, decay, found)
    if first < section.epochs:
        job.run.truncate_metrics(job.stage, first)
    total = max(1, section.epochs * steps)
    way = np.cumsum([schedule(step / total) for step in range(total)])
    train = resident(job.train, job.device)
    losses = [line["loss"] for line in job.run.read_metrics() if line["stage"] == job.stage]
    job.reporter.start(job.stage, section.epochs, steps, first, losses)
    try:
        with ExitStack() as watching, flushed_denormals(), job.tracker(first) as track:

            def watch() -> Forward:
                """Everything that holds on to the model and the decay that are under training now."""
                watching.enter_context(decay)
                return watching.enter_context(fast_steps(model, groups, section, job.reporter.say))

            forward = watch()
            for epoch in range(first, section.epochs):
                began = time.perf_counter()
                generator = seeded(job.seed, job.stage, epoch)
                order = torch.randperm(len(train), generator=generator)
                where = order.to(train.images.device)
                sums, told = torch.zeros(2, dtype=torch.float64, device=job.device), 0.0
                due = shrinking is not None and shrinking.due(epoch + 1, section.epochs)
                if due:
                    shrinking.begin()
                model.train()
                for step in range(steps):
                    if job.steering is not None and step % (every := job.steering.every(total)) == 0:
                        recent = float(sums[0] - told) / every if step else None
                        told = float(sums[0])
                        decay.weight = job.steering.look(float(way[epoch * steps + step] / way[-1]), recent)
                    factor = schedule((epoch * steps + step) / total)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * factor
                    part = slice(step * batch, (step + 1) * batch)
                    rows = where[part]
                    images, targets = augment(
                        train.images[rows], train.targets[rows], train.sizes[order[part]], generator
                    )
                    loss, penalty = _step(forward, optimizer, decay, job, images, targets)
                    sums += torch.stack([loss, penalty])
                    if step % LOOK_EVERY == 0 or step == steps - 1:
                        _check(loss, penalty, epoch, step)
                        alive, of = gates.count()
                        if due and step >= steps // 2:
                            shrinking.look(model, groups)
                        done = epoch * steps + step + 1
                        job.reporter.step(done, float(loss), float(penalty), decay.weight, alive, of)
                _flush(model)
                gates.record()
                cut = None
                if due:
                    watching.close()
                    cut = shrinking.cut(model, groups, decay, epoch + 1)
                    if cut is not None:
                        decay, optimizer = _go_on(cut, model, groups, optimizer, gates, job)
                        model, groups = cut.model, cut.groups
                        rates = [group["lr"] for group in optimizer.param_groups]
                    forward = watch()
                mean = (sums / steps).tolist()
                alive, of = gates.count()
                line = {
                    "stage": job.stage,
                    "epoch": epoch + 1,
                    "step": (epoch + 1) * steps,
                    "loss": mean[0],
                    "penalty": mean[1],
                    "lambda": decay.weight,
                    "lr": section.lr * factor,
                    "alive": alive,
                    "of": of,
                    **(job.steering.figures() if job.steering is not None else {}),
                    **({"shrunk": {key: cut.record[key] for key in ("channels", "params", "macs")}} if cut else {}),
                    "metrics": job.task.quick(model, job.val, 4 * batch),
                    "seconds": time.perf_counter() - began,
                }
                # The line first: one without its state is dropped and written again, a state without its line would
                # leave a gap. The same goes for what is tracked.
                track(line)
                job.run.append_metrics(line)
                if (epoch + 1) % section.checkpoint.every == 0 or epoch + 1 == section.epochs:
                    _save(model, optimizer, gates, job, epoch + 1)
                job.reporter.epoch(line)
    finally:
        job.reporter.stop()
    if job.stage == "train":
        job.run.write_arrays("gates.npz", gates.arrays())
    return model


def seeded(seed: int, stage: str, epoch: int) -> torch.Generator:
    """The generator of one epoch; torch's global one is seeded alike, for models that draw numbers themselves."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{epoch}".encode()).digest()[:7], "big")
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


def _step(
    forward: Callable[[Tensor], Tensor], optimizer: Any, decay: Decay, job: Job, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    images = normalise(images.to(job.device))
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.section.precision == "bf16"):
        output = forward(images)
    loss = job.task.loss(output, targets.to(job.device))
    penalty = decay.penalty()
    optimizer.zero_grad(set_to_none=True)
    (loss + penalty.to(loss.device)).backward()
    optimizer.step()
    return loss.detach(), penalty.detach().to(loss.device)


def _check(loss: Tensor, penalty: Tensor, epoch: int, step: int) -> None:
    for name, value in (("loss", loss), ("penalty", penalty)):
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {float(value)} at epoch {epoch + 1}, step {step + 1}; "
                "try a lower train.lr or decay.weight, or precision: float32"
            )


def chosen(table: registry.Registry, named: Named) -> Callable[..., Any]:
    """The builder that a recipe names, with the recipe's options."""
    return functools.partial(table.get(named.name), **named.options)


def _optimizer(model: nn.Module, job: Job, decay: Decay) -> torch.optim.Optimizer:
    section = job.section
    return chosen(registry.optimizers, section.optimizer)(shares(model, section.lr, section.gate_lr, decay.norms))


def _go_on(
    cut: Cut, model: nn.Module, groups: Sequence[Group], optimizer: torch.optim.Optimizer, gates: _Gates, job: Job
) -> tuple[Decay, torch.optim.Optimizer]:
    """What trains the model that a cut has left of this one; each is made anew and told what the one before knew."""
    decay = _reshaped(cut.model, cut.groups, gates, job)
    held = slim_optimizer(optimizer, model, cut.model, groups, cut.plan).state
    # In the order of parameters in which a run that goes on from a checkpoint makes it.
    made = _optimizer(cut.model, job, decay)
    for group in made.param_groups:
        made.state.update({p: held[p] for p in group["params"] if p in held})
    return decay, made


def _reshaped(model: nn.Module, groups: list[Group], gates: _Gates, job: Job) -> Decay:
    decay, job.steering = job.shrinking.equipped(model, groups, job.steering)
    gates.follow(model, groups, job.shrinking.places(gates.norms))
    return decay


class _Gates:
    """The gates of a model under training: how many live, and their course.

    Where the training shrinks, both are still of the model that it began with; what has been cut stands at zero.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], threshold: float):
        self.threshold = threshold
        self.follow(model, groups)
        self.of = sum(group.channels for group in self.groups)
        self.norms = list(dict.fromkeys(gate.norm for group in self.groups for gate in group.gates))
        self.width = {name: len(model.get_submodule(name).weight) for name in self.norms}
        self.places = {name: np.arange(width) for name, width in self.width.items()}
        self.course: dict[str, list[np.ndarray]] = {name: [] for name in self.norms}

    def follow(self, model: nn.Module, groups: Sequence[Group], places: Mapping[str, np.ndarray] | None = None) -> None:
        """Look at this model from now on; ``places`` says where what is left of a norm stands in the first one's."""
        self.model = model
        self.groups = [group for group in groups if group.reason is None]
        if places is not None:
            self.places = dict(places)

    def count(self) -> tuple[int, int]:
        """Living channels, of all."""
        alive = sum(int((scores(self.model, group) > self.threshold).sum()) for group in self.groups)
        return alive, self.of

    def record(self) -> None:
        for name in self.norms:
            row = np.zeros(self.width[name], np.float32)
            if len(self.places[name]):
                row[self.places[name]] = effective_gates(self.model.get_submodule(name))
            self.course[name].append(row)

    def arrays(self) -> dict[str, np.ndarray]:
        """Norm → (epochs, channels) float32."""
        return {name: np.stack(rows) for name, rows in self.course.items() if rows}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        self.course = {name: list(arrays[name]) if name in arrays else [] for name in self.norms}


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, gates: _Gates, job: Job, epoch: int) -> None:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    arrays |= {f"gates/{name}": rows for name, rows in gates.arrays().items()}
    parts = {"steering": job.steering, "shrinking": job.shrinking}
    state = {"epoch": epoch, **{name: part.state() for name, part in parts.items() if part is not None}}
    job.run.save_checkpoint(job.stage, epoch, arrays, state, job.section.checkpoint.keep)


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gates: _Gates,
    job: Job,
    decay: Decay,
    found: tuple[dict[str, np.ndarray], dict[str, Any]] | None,
) -> int:
    """Load a training state, where there is one; the number of epochs that are done."""
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


@torch.no_grad()
def _flush(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.masked_fill_(parameter.abs() < FLUSH, 0.0)
