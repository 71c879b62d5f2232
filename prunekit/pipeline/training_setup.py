"""From the recipe to a training: its decay, its loss and the :class:`TrainingJob` that the trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import FineTuning, Training
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import load_model
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.sparsity.dynamic_decay import Decay
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.losses import total_loss
from prunekit.training.acceleration import channels_last
from prunekit.training.distillation import TrainingLoss
from prunekit.training.trackers import track
from prunekit.training.trainer import Trainer, bind_options
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
        gradual_pruning=gradual,
        tracker=partial(track, recipe, run.path, training) if distributed.is_main_process() else no_tracker,
    )
    Trainer(model.to(context.device), job, groups, decay).fit()
    model.cpu().eval()


def gates_out_of_reach(context: RunContext, model: nn.Module, groups: list[Group]) -> str | None:
    """Return a sentence if training is too short for any gate of its first model to fall to the threshold.

    Adam's steps are at most about the learning rate, however large the decay.
    """
    recipe, section = context.recipe, context.recipe.train
    by_threshold = recipe.slim.threshold > 0 and not recipe.target.given
    if section.optimizer.name not in ("adam", "adamw") or not by_threshold:
        return None
    schedule = bind_options(registry.schedules, section.schedule)
    batch = section.batch_size * section.accumulate * distributed.world_size()
    steps = section.epochs * max(1, len(context.tensors("train")) // batch)
    if (start := section.gradual_pruning.start) is not None:
        steps = round(start * steps)
    scores = [float(gates.min()) for gates in gate(model, groups).values()]
    if not steps or not scores:
        return None
    rate = section.gate_lr or section.lr
    fall = rate * sum(schedule(step / steps) for step in range(steps))
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
