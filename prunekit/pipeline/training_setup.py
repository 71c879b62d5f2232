"""From the recipe to a training: its decay, its loss and the :class:`TrainingJob` that the trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import FineTuning, Training
from prunekit.data.datasets import Tensors, normalize
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.export import compared
from prunekit.pipeline.models import load_model
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.sparsity.dynamic_decay import Decay
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.pruning.surgery.recalibrate import recalibrate
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.losses import total_loss
from prunekit.training.acceleration import channels_last
from prunekit.training.distillation import TrainingLoss
from prunekit.training.phases import Phases
from prunekit.training.trackers import track
from prunekit.training.trainer import Trainer, bind_options, seeded_generator
from prunekit.training.training_job import TrainingJob, no_tracker
from prunekit.utils import distributed
from prunekit.utils.text import plural


def build_decay(context: RunContext, model: nn.Module, groups: list[Group]) -> Decay:
    """Return the recipe's decay for the gates of a model."""
    section = context.recipe.decay
    return registry.decays.get(section.name)(model, groups, section.weight, **section.options)


def train_model(
    context: RunContext,
    run: RunDir,
    training: str,
    model: nn.Module,
    groups: list[Group],
    decay: Decay,
    gradual: Callable[[int], GradualPruning] | None = None,
) -> None:
    """Train a model in place, resuming from the newest checkpoint; it ends in eval mode on the CPU.

    Args:
        training: its name. "train" and "baseline" follow the recipe's section train, all others finetune.
        gradual: given the number of steps, returns what shrinks channels to zero during training.
    """
    recipe = context.recipe

    def resized(size: int) -> Tensors:
        with distributed.main_process_first():  # the others read what it has cached
            return context.tensors("train", size)

    section = recipe.train if training in ("train", "baseline") else recipe.finetune
    job = TrainingJob(
        stage=training,
        config=section,
        task=context.task,
        loss=_training_loss(context, run, section),
        train_data=context.tensors("train"),
        val_data=context.tensors("val"),
        seed=recipe.seed,
        run=run,
        reporter=context.reporter,
        device=context.device,
        threshold=recipe.slim.threshold,
        resized=resized,
        gradual_pruning=gradual,
        stop_before_pruning=context.stop_before_pruning,
        tracker=partial(track, recipe, run.path, training) if distributed.is_main_process() else no_tracker,
    )
    Trainer(model.to(context.device), job, groups, decay).fit()
    progressive = section.progressive
    if len(progressive.sizes) > 1 and progressive.recalibrate and section.epochs:
        recalibrate_norms(context, model, training, section.batch_size, progressive.recalibrate)
    model.cpu().eval()


def recalibrate_norms(
    context: RunContext, model: nn.Module, training: str, batch_size: int, count: int
) -> dict[str, Any]:
    """Measure the statistics of a model's norms again on training images, and report what that changes.

    Args:
        model: on the device.
        training: named in the message.
        batch_size: images of a batch.
        count: batches at most.

    Returns:
        The number of batches, and the validation metrics before and after.
    """
    train, val = context.tensors("train"), context.tensors("val")
    order = torch.randperm(len(train), generator=seeded_generator(context.recipe.seed, "recalibrate", 0))
    full = [rows for rows in order.split(batch_size)[:count] if len(rows) == min(batch_size, len(order))]
    before = context.task.validate(model, val, 4 * batch_size)
    done = recalibrate(model, (normalize(train.images[rows].to(context.device)) for rows in full))
    after = context.task.validate(model, val, 4 * batch_size)
    context.reporter.info(f"{training}: norms recalibrated on {done} batches: {compared(before, after)}")
    return {"batches": done, "before": before, "after": after}


def gates_out_of_reach(context: RunContext, model: nn.Module, groups: list[Group]) -> str | None:
    """Return a sentence if training is too short for any gate of its first model to fall to the threshold.

    Adam's steps are at most about the learning rate, however large the decay.
    """
    recipe, section = context.recipe, context.recipe.train
    by_threshold = recipe.slim.threshold > 0 and not recipe.target.given
    if section.optimizer.name not in ("adam", "adamw") or not by_threshold:
        return None
    schedule = bind_options(registry.schedules, section.schedule)
    images, micro_batches = len(context.tensors("train")), section.accumulate * distributed.world_size()
    shares = list(Phases(section, recipe.data.size, images, micro_batches).shares())
    if (start := section.gradual_pruning.start) is not None:
        shares = [share for share in shares if share < start]
    scores = [float(gates.min()) for gates in gate(model, groups).values()]
    if not shares or not scores:
        return None
    rate, steps = section.gate_lr or section.lr, len(shares)
    fall = rate * sum(map(schedule, shares))
    if min(scores) - fall <= recipe.slim.threshold:
        return None
    return (
        f"with {section.optimizer.name}, a gate falls by about {fall:.2g} at most in {plural(steps, 'step')} at "
        f"train.gate_lr={rate:g}, and the smallest begins at {min(scores):.2g}: none reaches "
        f"slim.threshold={recipe.slim.threshold:g}; raise train.gate_lr or train.epochs"
    )


def build_loss(context: RunContext, section: Training) -> Callable[[Any, Tensor], Tensor]:
    """Return the loss of a model's outputs that a recipe names."""
    return total_loss(bind_options(registry.losses, section.loss)(context.task), section.output_weights)


def _training_loss(context: RunContext, run: RunDir, section: Training) -> TrainingLoss:
    loss = build_loss(context, section)
    if not (isinstance(section, FineTuning) and section.distill.weight):
        return TrainingLoss(loss)
    distill = section.distill
    teacher = load_model(run, distill.teacher, context.recipe).to(context.device)
    # Without messages: the student prints the same ones.
    teacher = channels_last(teacher, teacher, lambda _: None)
    return TrainingLoss(loss, context.task, teacher, distill.weight, distill.temperature)
