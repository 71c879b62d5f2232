"""The stages of a run, one function each, in their order. Each reads what it needs from the run folder and writes its
result into it, so that a run can be picked up anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from prunekit.data.datasets import normalize
from prunekit.data.images import encode_png
from prunekit.errors import TrainingError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.export import Exporter, variants
from prunekit.pipeline.models import MODELS, initial_model, load_model, newest_model, save_model
from prunekit.pipeline.prune_stages import extract_stage, keep_cuts, shrinking, slim_stage, steering
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.decay import NoDecay
from prunekit.pruning.surgery.recalibrate import recalibrate
from prunekit.runs.run_dir import RunDir
from prunekit.training.trainer import seeded_generator

GALLERY = 16  # fixed validation images
EXTREMES = 4  # best and worst ones beside them


def train_stage(work: RunContext, run: RunDir) -> None:
    work.keep_classes(run)
    model = work.start_model(run)
    groups = find_groups(model, work.example())
    run.update_summary("skipped", {split: work.pairs(split).skipped for split in ("train", "val")})
    shrink = shrinking(work, model, groups)
    decay = work.decay(model.to(work.device), groups)
    model = work.train(run, "train", model, groups, decay, steering(work, model, groups, decay), shrink)
    if shrink is not None and shrink.plan is not None:
        keep_cuts(work, run, shrink)
    save_model(run, "dense", model)
    work.measure(run, "dense", initial_model(run, work.recipe))
    if work.recipe.baseline:
        _train_baseline(work, run)


def finetune_stage(work: RunContext, run: RunDir) -> None:
    model = load_model(run, "slim", work.recipe)
    groups = find_groups(model, work.example())
    # A stage that goes on has a training state, and its statistics stand in that.
    if work.recipe.slim.recalibrate and run.latest_checkpoint("finetune") is None:
        _recalibrate(work, run, model.to(work.device))
    work.train(run, "finetune", model, groups, NoDecay(model, groups))
    save_model(run, "finetuned", model)
    work.measure(run, "finetuned", model)


def evaluate_stage(work: RunContext, run: RunDir) -> None:
    work.keep_classes(run)
    recipe, pairs = work.recipe, work.pairs("val")
    present = [name for name in MODELS if run.has(f"{name}/model.safetensors")]
    models = {name: load_model(run, name, recipe).to(work.device) for name in present}
    curves, errors = {}, []
    for name, model in models.items():
        counter = work.reporter.progress_bar(f"evaluate {name}")
        try:
            result = work.task.evaluate(model, pairs, recipe.data.size, 4 * recipe.train.batch_size, counter)
        finally:
            counter.close()
        odd = [f"{key} is {value}" for key, value in result.metrics.items() if not math.isfinite(value)]
        if odd:
            raise TrainingError(f"evaluate: the {name} model's {odd[0]}, so it is not written down; see to its outputs")
        run.update_summary(name, {**run.read_json("summary.json")[name], "metrics": result.metrics})
        curves[name] = result.curves
        errors = result.errors
        work.reporter.info(f"evaluate: {name:9} " + "  ".join(f"{k} {v:.4f}" for k, v in result.metrics.items()))
    run.write_json("curves.json", curves)
    found = work.task.trivial_scores(pairs)
    if found:
        run.update_summary("reference", found)
        best, main = work.task.best(found), work.task.metric_names[0]
        work.reporter.info(f"evaluate: best trivial predictor: {best}, {main} {found[best][main]:.4f}")
    run.update_summary("skipped", {split: work.pairs(split).skipped for split in ("train", "val")})
    _gallery(work, run, models, np.argsort(errors, kind="stable"))


def export_stage(work: RunContext, run: RunDir) -> None:
    wanted = variants(work.recipe.export)
    run.remove_summary("export")
    if wanted:
        exporter = Exporter(work, run, newest_model(run))
        for variant in wanted:
            exporter.write(variant)


def report_stage(work: RunContext, run: RunDir) -> None:
    """The report itself is printed at the end, when the run is complete."""


STAGE_FUNCTIONS: dict[str, Callable[[RunContext, RunDir], None]] = {
    "train": train_stage,
    "extract": extract_stage,
    "slim": slim_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "report": report_stage,
}


def _train_baseline(work: RunContext, run: RunDir) -> None:
    """Train what sparse training has begun with once more, without decay."""
    model = work.start_model(run)
    groups = find_groups(model, work.example())
    model = work.train(run, "baseline", model, groups, NoDecay(model.to(work.device), groups))
    save_model(run, "baseline", model)
    work.measure(run, "baseline", model)


def _recalibrate(work: RunContext, run: RunDir, model: nn.Module) -> None:
    """Measure the norms' statistics on training data, and write down what that did to the metrics."""
    size = work.recipe.finetune.batch_size
    train, val = work.tensors("train"), work.tensors("val")
    order = torch.randperm(len(train), generator=seeded_generator(work.recipe.seed, "recalibrate", 0))
    rows = [batch for batch in order.split(size)[: work.recipe.slim.recalibrate] if len(batch) == min(size, len(order))]
    before = work.task.validate(model, val, 4 * size)
    batches = recalibrate(model, (normalize(train.images[batch].to(work.device)) for batch in rows))
    after = work.task.validate(model, val, 4 * size)
    run.update_summary("recalibrated", {"batches": batches, "before": before, "after": after})
    change = "  ".join(f"{key} {value:.4f} → {after[key]:.4f}" for key, value in before.items())
    work.reporter.info(f"finetune: norms recalibrated on {batches} batches: {change}")


def _gallery(work: RunContext, run: RunDir, models: dict[str, nn.Module], by_error: np.ndarray) -> None:
    pairs = work.pairs("val")
    fixed = set(np.linspace(0, len(pairs) - 1, min(GALLERY, len(pairs))).astype(int).tolist())
    kinds = {**{int(i): "best" for i in by_error[:EXTREMES]}, **{int(i): "worst" for i in by_error[::-1][:EXTREMES]}}
    entries = []
    for index in sorted({*fixed, *kinds}):
        image, target = pairs.pair(index)
        shown = {"image": image, "truth": pairs.display_target(target)}
        for name, model in models.items():
            shown[name] = work.task.render(work.task.predict(model, image, work.recipe.data.size), pairs.classes)
        entry = {"index": index, "name": pairs.names[index], "fixed": index in fixed, "kind": kinds.get(index)}
        for name, value in shown.items():
            if isinstance(value, np.ndarray):
                run.write_bytes(f"gallery/{index:04d}-{name}.png", encode_png(value))
            else:
                entry[name] = value
        entries.append(entry)
    run.write_json("gallery/index.json", entries)
