"""Checks before a run writes anything: everything that the recipe names is built and tried once."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from prunekit.config import registry
from prunekit.config.schema import Recipe, Slim, Training
from prunekit.data.datasets import normalize
from prunekit.errors import PlanError, RecipeError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import CLASSES, build_dense, load_model, newest_model, open_initial_run, read_classes
from prunekit.pipeline.rehearsal import rehearse
from prunekit.pipeline.training_setup import build_loss, gates_out_of_reach
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.layer_matching import match_layers
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import inference, main_output
from prunekit.training.optimizers import param_groups
from prunekit.training.trackers import check_tracker
from prunekit.training.trainer import bind_options
from prunekit.utils.copying import copy_module
from prunekit.utils.io import is_out_of_memory
from prunekit.utils.text import first_line, one_line


def check_recipe(context: RunContext, *, load_data: bool, load_init: bool = False, rehearsal: bool = False) -> None:
    """Build everything that the recipe names, so that errors are raised before the run folder is made.

    Args:
        context: of the run.
        load_data: read all images too.
        load_init: load the model of the run that ``init`` names too.
        rehearsal: see :func:`~prunekit.pipeline.rehearsal.rehearse`; needs ``load_data``.
    """
    recipe = context.recipe
    check_tracker(recipe)
    _check_devices(recipe)
    model = build_dense(recipe)
    _check_data_and_output(context, model)
    _check_ignored_layers(context, model)
    initial = model
    if recipe.init is not None and load_init:
        source = open_initial_run(recipe)
        initial = load_model(source, newest_model(source))
        check_classes(context, source)
    if load_data:
        for split in ("train", "val"):
            if warning := context.dataset(split).target_warning(context.tensors(split).targets):
                context.reporter.info(f"{split}: {warning}")
        _report_large_batches(context)
        _report_unused_threshold(context)
        _check_losses(context, initial)
    if recipe.finetune.distill.weight:
        nothing = torch.zeros(1, 1, 1, 1)
        context.task.distillation_loss(nothing, nothing, 1.0)
    _check_training_options(context, model)
    if rehearsal:
        if warning := gates_out_of_reach(context, initial, context.dense_groups(initial)):
            context.reporter.info(f"train: {warning}")
        rehearse(context, initial)


def check_classes(context: RunContext, run: RunDir) -> None:
    """Raise RecipeError if the classes of the data, or their order, differ from those of a run folder."""
    ours = list(context.dataset("train").classes)
    theirs = read_classes(run) if run.has(CLASSES) else ours
    if ours != theirs:
        raise RecipeError(
            f"data: its classes are {', '.join(ours)}, and the models of {run.path} were trained on "
            f"{', '.join(theirs)}; name data with the same classes, or start a new run"
        )


def _check_devices(recipe: Recipe) -> None:
    for stage in ("train", "finetune"):
        if getattr(recipe, stage).sync_norms and PartialState().device.type == "cpu":
            raise RecipeError(
                f"{stage}.sync_norms: synchronized norms (SyncBatchNorm) need GPUs, and this run is on the CPU; "
                f"set {stage}.sync_norms=false"
            )


def _check_data_and_output(context: RunContext, model: nn.Module) -> None:
    recipe, task = context.recipe, context.task
    train, val = context.dataset("train"), context.dataset("val")
    for dataset in (train, val):
        if not isinstance(dataset, task.dataset_type):
            raise RecipeError(
                f"task {recipe.task} learns from {task.dataset_type.targets}, and the data set {recipe.data.name} has "
                f"{dataset.targets}; name another task or another data set (see: prunekit list)"
            )
    if train.classes != val.classes:
        raise RecipeError(
            f"data set {recipe.data.name}: training and validation have different classes; give both the same"
        )
    sizes = {recipe.data.size: "data.size"}
    for stage in ("train", "finetune"):
        for size in getattr(recipe, stage).progressive.sizes:
            sizes.setdefault(size, f"{stage}.progressive.sizes")
    faults = []
    for size, key in sizes.items():
        if fault := _output_fault(context, model, size):
            problem, _, advice = fault.rpartition("; ")
            others = _other_sizes(context, model, size)
            fix = f"set {key}={others}" if key == "data.size" else f"in {key}, replace {size} by {others}"
            faults.append(f"{problem}; {fix if others else advice}" if problem else fault)
    if faults:
        raise RecipeError("\n".join(faults))


def _output_fault(context: RunContext, model: nn.Module, size: int) -> str | None:
    """Return what is wrong with the output for images of this size, and the fix; None if nothing is."""
    recipe, backbone = context.recipe, f"backbone {context.recipe.backbone.name}"
    try:
        with inference(model):
            output = main_output(model(torch.zeros(1, *context.shape[:-2], size, size)))
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return f"{backbone} cannot take an image of {size}×{size} ({one_line(error)}); set another data.size"
    fault = context.task.check_output(output, size, context.dataset("train"))
    return fault and f"task {recipe.task} with {backbone}: {fault}"


def _other_sizes(context: RunContext, model: nn.Module, size: int) -> str | None:
    """Return the nearest sizes whose output is right, as text; None if there is none."""
    single = None
    for step in (2, 4, 8, 16, 32, 64, 224):
        below = size // step * step
        near = [side for side in (below, below + step) if side not in (0, size)] if size % step else []
        fitting = [str(side) for side in near if _output_fault(context, model, side) is None]
        if len(fitting) == 2:
            return f"{fitting[0]} or {fitting[1]} (a multiple of {step})"
        single = single or next(iter(fitting), None)
    return single


def _check_losses(context: RunContext, model: nn.Module) -> None:
    """Compute the losses of two images as in training; RecipeError if that fails, a message if logits look wrong."""
    recipe, data = context.recipe, context.tensors("train")
    images, targets = normalize(data.images[:2]), data.targets[:2]
    if len(images) < 2:
        return  # Norms without pixels need two images.
    try:
        model = copy_module(model)
    except (RuntimeError, TypeError):
        return  # The rehearsal says why.
    for stage in ("train", "finetune"):
        section: Training = getattr(recipe, stage)
        if section.epochs:
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    build_loss(context, section)(model.train()(images), targets)
            except RecipeError as error:
                raise RecipeError(f"{stage}.{error}") from error
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                raise RecipeError(
                    f"{stage}.loss: {section.loss.name} cannot be computed from what the model returns in training "
                    f"({first_line(error)}); return a tensor, or a tuple, list or dict of tensors"
                ) from error
    losses = {section.loss.name for section in (recipe.train, recipe.finetune)}
    if context.task.takes_logits and losses <= {"task", "bce_iou", "structure"}:
        with inference(model):
            # The second input drives logits out of the range of probabilities.
            outputs = [main_output(model(scale * images)) for scale in (1, 1000)]
        if all(0 <= output.min() < output.max() <= 1 for output in outputs):
            context.reporter.info(
                f"backbone {recipe.backbone.name}: its outputs lie between 0 and 1, but the loss expects logits; "
                "remove the sigmoid or softmax at its end"
            )


def _report_large_batches(context: RunContext) -> None:
    count = len(context.tensors("train"))
    for stage in ("train", "finetune"):
        section: Training = getattr(context.recipe, stage)
        batches = {"batch_size": section.batch_size}
        if section.progressive.sizes and section.progressive.batch_sizes:
            batches["progressive.batch_sizes"] = max(section.progressive.batch_sizes)
        for key, largest in batches.items() if section.epochs else ():
            if largest > count:
                context.reporter.info(
                    f"{stage}.{key}={largest} is larger than the {count} training images: an epoch is one step; lower "
                    "it for more steps"
                )


def _report_unused_threshold(context: RunContext) -> None:
    recipe, default = context.recipe, Slim.model_fields["threshold"].default
    for key in recipe.target.given:
        if recipe.slim.threshold != default:
            context.reporter.info(
                f"slim.threshold={recipe.slim.threshold:g} has no effect with target.{key}; to prune by threshold, set "
                f"target.{key}=null"
            )


def _check_ignored_layers(context: RunContext, model: nn.Module) -> None:
    if patterns := context.recipe.slim.ignored_layers:
        try:
            match_layers(model, find_groups(model, torch.zeros(1, *context.shape)), patterns)
        except PlanError as error:
            raise RecipeError(f"slim.{error}") from error


def _check_training_options(context: RunContext, model: nn.Module) -> None:
    images, sizes = torch.zeros(1, 3, 8, 8), torch.full((1, 2), 8.0)
    targets = context.dataset("train").empty_targets(1, 8)
    for stage in ("train", "finetune"):
        section: Training = getattr(context.recipe, stage)
        parameters = param_groups(model, section.lr, section.gate_lr)
        trials: dict[str, tuple[registry.Registry, tuple[Any, ...]]] = {
            "optimizer": (registry.optimizers, (parameters,)),
            "schedule": (registry.schedules, (0.5,)),
            "loss": (registry.losses, (context.task,)),
            "augment": (registry.augmentations, (images, targets, sizes, torch.Generator().manual_seed(0))),
        }
        for key, (table, arguments) in trials.items():
            try:
                bind_options(table, getattr(section, key))(*arguments)
            except (TypeError, ValueError) as error:
                raise RecipeError(f"{stage}.{key}: {error}") from error
