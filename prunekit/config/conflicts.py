"""Keys of a recipe that are valid alone but conflict with other keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from prunekit.config import registry, yaml
from prunekit.config.schema import Recipe, Training
from prunekit.utils.text import plural


def find_conflicts(recipe: Recipe) -> list[tuple[yaml.Path, str]]:
    """Return the keys that conflict with others, each with a message that proposes the fix."""
    conflicts: list[tuple[yaml.Path, str]] = []
    slim, distill = recipe.slim, recipe.finetune.distill
    if not recipe.target.given:
        add = "add target.params, target.macs, target.params_ratio, target.macs_ratio or target.latency_ratio"
        if (name := slim.importance.name) != "gate":
            conflicts.append((("slim", "importance"), f"{name!r} ranks channels but has no threshold; {add}"))
        if slim.cost_power:
            conflicts.append((("slim", "cost_power"), f"costs are shares of a target's measure; {add}"))
        if slim.steps > 1:
            conflicts.append((("slim", "steps"), f"{slim.steps} steps need a target; {add}"))
        if recipe.train.gradual_pruning.rounds > 1:
            conflicts.append((("train", "gradual_pruning", "rounds"), f"several rounds need a target; {add}"))
        if slim.scope != "global":
            conflicts.append((("slim", "scope"), f"{slim.scope!r} needs a target; {add}"))
    elif slim.cost_power and slim.scope == "layer":
        message = "costs compare layers, and slim.scope=layer prunes the same share of each; drop one of the two"
        conflicts.append((("slim", "cost_power"), message))
    if latency := next((key for key in recipe.target.given if key.startswith("latency")), None):
        for key, default in (("cost_power", 0), ("scope", "global"), ("steps", 1)):
            if getattr(slim, key) != default:
                message = f"target.{latency} ranks channels by what they save of the latency; drop it"
                conflicts.append((("slim", key), message))
    gradual = recipe.train.gradual_pruning
    if gradual.start is not None:
        if gradual.start >= gradual.end:
            message = f"{gradual.end:g} is not above train.gradual_pruning.start ({gradual.start:g}); raise it"
            conflicts.append((("train", "gradual_pruning", "end"), message))
        if slim.steps > 1:
            message = "gradual pruning reaches the target in training; drop it, or use train.gradual_pruning.rounds"
            conflicts.append((("slim", "steps"), message))
    if recipe.init_weights == "fresh" and recipe.init is None:
        conflicts.append((("init_weights",), "'fresh' takes the channel counts of a run; name one with init=RUN"))
    if distill.weight and distill.teacher == "baseline" and not recipe.baseline:
        message = "there is no baseline; set baseline=true or finetune.distill.teacher=dense"
        conflicts.append((("finetune", "distill", "teacher"), message))
    for stage in ("train", "finetune"):
        training: Training = getattr(recipe, stage)
        if training.progressive.sizes:
            found = _progressive_conflicts(training, stage, recipe.data.size)
            conflicts += [((stage, "progressive", key), message) for key, message in found]
        if training.sync_norms and training.compile:
            message = f"a compiled model cannot synchronize processes; drop it or {stage}.compile"
            conflicts.append(((stage, "sync_norms"), message))
    return conflicts


def _progressive_conflicts(training: Training, stage: str, data_size: int) -> Iterator[tuple[str, str]]:
    """Yield the keys of a stage's section ``progressive`` that do not fit the others, each with a message."""
    progressive = training.progressive
    sizes, milestones, count = progressive.sizes, progressive.milestones, len(progressive.sizes)
    if sizes != sorted(set(sizes)):
        yield "sizes", f"{sizes} does not increase; write {sorted(set(sizes))}"
    elif sizes[-1] != data_size:
        complete = [size for size in sizes if size < data_size] + [data_size]
        yield (
            "sizes",
            f"{sizes} does not end with data.size={data_size}, at which the model is evaluated; write {complete}, or "
            f"set data.size={sizes[-1]}",
        )
    if milestones and len(milestones) != count - 1:
        yield "milestones", f"{milestones} needs a share for each size but the first, {count - 1} in all"
    elif any(low >= high for low, high in pairwise(milestones)):
        yield "milestones", f"{milestones} does not increase; write {sorted(set(milestones))}"
    elif training.epochs:
        epochs = pairwise([*progressive.first_epochs(training.epochs), training.epochs])
        if missing := [size for size, (first, end) in zip(sizes, epochs, strict=True) if first >= end]:
            yield (
                "milestones" if milestones else "sizes",
                f"of {plural(training.epochs, 'epoch')}, size {missing[0]} gets none; raise {stage}.epochs, or set "
                f"{stage}.progressive.sizes=[] to train at data.size alone",
            )
    batch_sizes, strengths = progressive.batch_sizes, progressive.strengths
    if batch_sizes and len(batch_sizes) != count:
        yield "batch_sizes", f"{batch_sizes} needs a batch size for each of the {count} sizes"
    elif batch_sizes and batch_sizes[-1] != training.batch_size:
        yield (
            "batch_sizes",
            f"{batch_sizes} does not end with {stage}.batch_size={training.batch_size}; write it last, or set "
            f"{stage}.batch_size={batch_sizes[-1]}",
        )
    if strengths and len(strengths) != count:
        yield "strengths", f"{strengths} needs a factor for each of the {count} sizes"
    elif strengths:
        options = registry.augmentations.options(training.augment.name)
        if "strength" not in options and not registry.takes_any_option(options):
            yield "strengths", f"augmentation {training.augment.name!r} has no option strength; drop it"
