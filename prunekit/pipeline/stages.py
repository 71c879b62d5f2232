"""The stages of a run, one function each. A stage reads its input from the run folder and writes its result there."""

from __future__ import annotations

import functools
import logging
import math
import traceback
from collections.abc import Callable
from contextlib import closing

import numpy as np
from torch import nn

from prunekit.config.schema import Recipe
from prunekit.data.images import encode_png
from prunekit.errors import CheckpointError, ExportError, PrunekitError, RunError, TrainingError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.export import Exporter, variants
from prunekit.pipeline.models import (
    CLASSES,
    create_initial_model,
    load_model,
    newest_model,
    read_plan,
    save_model,
    trained_models,
)
from prunekit.pipeline.preflight import check_classes
from prunekit.pipeline.prune_stages import extract_stage, gradual_pruning, slim_stage
from prunekit.pipeline.training_setup import build_decay, recalibrate_norms, train_model
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import NoDecay
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task
from prunekit.utils.io import is_disk_failure
from prunekit.utils.text import first_line

GALLERY = 16  # evenly spaced validation images
EXTREMES = 4  # images with the lowest error, and as many with the highest

logger = logging.getLogger(__name__)


def train_stage(context: RunContext, run: RunDir) -> None:
    """Train with decay, and without it where the recipe asks for a baseline."""
    _record_classes(context, run)
    model, plan = create_initial_model(run, context.recipe)
    groups = context.dense_groups(model)
    _record_skipped_images(context, run)
    decay = build_decay(context, model.to(context.device), groups)
    gradual = gradual_pruning(context, model, groups)
    train_model(context, run, "train", model, groups, decay, gradual)
    save_model(run, "dense", model, plan)
    context.measure(run, "dense", model)
    if context.recipe.baseline:
        _train_baseline(context, run)


def finetune_stage(context: RunContext, run: RunDir) -> None:
    """Fine-tune the slim model."""
    model = load_model(run, "slim", context.recipe)
    groups = find_groups(model, context.example())
    # A checkpoint holds the recalibrated statistics already.
    recipe = context.recipe
    if recipe.slim.recalibrate and run.latest_checkpoint("finetune") is None:
        sizes = recipe.finetune.batch_size, recipe.slim.recalibrate
        recalibrated = recalibrate_norms(context, model.to(context.device), "finetune", *sizes)
        run.update_summary("recalibrated", recalibrated)
    train_model(context, run, "finetune", model, groups, NoDecay(model, groups))
    save_model(run, "finetuned", model, read_plan(run, "slim"))
    context.measure(run, "finetuned", model)


def evaluate_stage(context: RunContext, run: RunDir) -> None:
    """Evaluate all models of the run and the trivial predictors, and write the gallery."""
    _record_classes(context, run)
    recipe, task, dataset = context.recipe, context.task, context.dataset("val")
    models = {name: load_model(run, name, recipe).to(context.device) for name in trained_models(run)}
    curves, errors = {}, []
    for name, model in models.items():
        with closing(context.reporter.progress_bar(f"evaluate {name}")) as bar:
            result = task.evaluate(model, dataset, recipe.data.size, 4 * recipe.train.batch_size, bar)
        for key, value in result.metrics.items():
            if not math.isfinite(value):
                raise TrainingError(f"evaluate: {key} of the {name} model is {value}; check its outputs")
        run.update_summary(name, {**run.read_json("summary.json")[name], "metrics": result.metrics})
        curves[name] = result.curves
        errors = result.errors
        figures = "  ".join(f"{key} {value:.4f}" for key, value in result.metrics.items())
        context.reporter.info(f"evaluate: {name:9} {figures}")
    run.write_json("curves.json", curves)
    reference = task.trivial_scores(dataset)
    if reference:
        run.update_summary("reference", reference)
        best, metric = task.best(reference), task.metric_names[0]
        context.reporter.info(f"evaluate: best trivial predictor: {best}, {metric} {reference[best][metric]:.4f}")
        summary = run.read_json("summary.json")
        if warning := trivial_warning(task, recipe, {name: summary[name]["metrics"] for name in models}, reference):
            logger.warning("evaluate: %s", warning)
    _record_skipped_images(context, run)
    _write_gallery(context, run, models, np.argsort(errors, kind="stable"))


def trivial_warning(
    task: Task, recipe: Recipe, metrics: dict[str, dict[str, float]], reference: dict[str, dict[str, float]]
) -> str | None:
    """Return a warning with advice if models are no better than a trivial predictor, by the first metric.

    Args:
        metrics: name of each model → its metrics.
        reference: name of each trivial predictor → its metrics.
    """
    best, metric = task.best(reference), task.metric_names[0]
    # Of equal scores the first wins.
    failing = [name for name, values in metrics.items() if task.best({best: reference[best], name: values}) == best]
    target = next((f"target.{key}" for key in recipe.target.given), None)
    if "baseline" in failing or ("dense" in failing and not recipe.decay.weight):
        advice = "train longer (train.epochs), or with another train.lr"
    elif "dense" in failing:
        advice = f"train longer (train.epochs), or {f'raise {target}' if target else 'lower decay.weight'}"
    else:
        # Fine-tuning may recover what pruning has cost.
        failing = failing if "finetuned" in failing or "finetuned" not in metrics else []
        advice = f"fine-tune longer (finetune.epochs), or {f'raise {target}' if target else 'lower slim.threshold'}"
    if not failing:
        return None
    figures = ", ".join(f"{name} {metrics[name][metric]:.4f}" for name in failing)
    return f"no better than the trivial predictor {best} ({metric} {reference[best][metric]:.4f}): {figures}; {advice}"


def export_stage(context: RunContext, run: RunDir) -> None:
    """Write the newest model in the forms that the recipe asks for; raise ExportError after all of them."""
    run.remove_summary("export")
    failures, name = [], newest_model(run)
    exporter = functools.cache(lambda: Exporter(context, run, name))
    for variant in variants(context.recipe.export):
        try:
            exporter().write(variant)
        except (CheckpointError, RunError):
            raise
        except Exception as error:
            if is_disk_failure(error):
                raise
            for line in traceback.format_exc().splitlines():
                context.reporter.write_log(line)
            reason = str(error) if isinstance(error, PrunekitError) else f"{type(error).__name__}: {first_line(error)}"
            failures.append(f"{variant.path(name, True)}: {reason}")
    if failures:
        raise ExportError(
            f"export: {'; '.join(failures)}; everything else is done; export again with --resume, or change what is "
            "exported, such as --resume export.onnx=false"
        )


STAGE_FUNCTIONS: dict[str, Callable[[RunContext, RunDir], None]] = {
    "train": train_stage,
    "extract": extract_stage,
    "slim": slim_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "report": lambda context, run: None,  # it is printed when the run is complete
}


def _train_baseline(context: RunContext, run: RunDir) -> None:
    model, plan = create_initial_model(run, context.recipe)
    groups = context.dense_groups(model)
    train_model(context, run, "baseline", model, groups, NoDecay(model.to(context.device), groups))
    save_model(run, "baseline", model, plan)
    context.measure(run, "baseline", model)


def _record_classes(context: RunContext, run: RunDir) -> None:
    check_classes(context, run)
    classes = context.dataset("train").classes
    if classes and not run.has(CLASSES):
        run.write_json(CLASSES, list(classes))


def _record_skipped_images(context: RunContext, run: RunDir) -> None:
    run.update_summary("skipped", {split: context.dataset(split).skipped for split in ("train", "val")})


def _write_gallery(context: RunContext, run: RunDir, models: dict[str, nn.Module], by_error: np.ndarray) -> None:
    dataset = context.dataset("val")
    fixed = set(np.linspace(0, len(dataset) - 1, min(GALLERY, len(dataset))).astype(int).tolist())
    kinds = {**{int(i): "best" for i in by_error[:EXTREMES]}, **{int(i): "worst" for i in by_error[::-1][:EXTREMES]}}
    entries = []
    for index in sorted({*fixed, *kinds}):
        image, target = dataset.pair(index)
        pictures = {"image": image, "truth": dataset.display_target(target)}
        for name, model in models.items():
            prediction = context.task.predict(model, image, context.recipe.data.size)
            pictures[name] = context.task.render(prediction, dataset.classes)
        entry = {"index": index, "name": dataset.names[index], "fixed": index in fixed, "kind": kinds.get(index)}
        for name, value in pictures.items():
            if isinstance(value, np.ndarray):
                run.write_bytes(f"gallery/{index:04d}-{name}.png", encode_png(value))
            else:
                entry[name] = value
        entries.append(entry)
    run.write_json("gallery/index.json", entries)
