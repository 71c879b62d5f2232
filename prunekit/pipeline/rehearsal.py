"""A rehearsal before a run trains: one pruning, one evaluation and the exports, of the untrained model.

What would fail after all of the training fails before, with the name of the group or option.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from prunekit.deployment.values import UNTRAINED_TOLERANCE, tolerance
from prunekit.errors import PlanError, PrunekitError, RecipeError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.export import Exporter, variants
from prunekit.pipeline.prune_stages import absolute_budget, channel_search
from prunekit.pruning.plan import Group
from prunekit.pruning.surgery.equivalence import DEAD
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.recalibrate import recalibrate
from prunekit.pruning.surgery.slim import apply_plan, slim
from prunekit.runs.run_dir import RunDir
from prunekit.runs.state import new_state
from prunekit.runs.worker_run_dir import WorkerRunDir
from prunekit.tasks.base import compute_metrics, inference, main_output
from prunekit.utils.copying import copy_module
from prunekit.utils.io import is_disk_failure, is_out_of_memory
from prunekit.utils.progress import Reporter
from prunekit.utils.text import first_line, join_names

IMAGES = 2


def rehearse(context: RunContext, model: nn.Module, *, prune: bool = True) -> None:
    """Prune the first channel of each group of a copy, evaluate it on an image, and export it to memory.

    Args:
        model: that training begins with; or, without ``prune``, the one that is fine-tuned.

    Raises:
        RecipeError: it fails; the message names the group or the option.
    """
    quiet = copy.copy(context)
    quiet.reporter = Reporter(Console(quiet=True))
    example = context.example()[:IMAGES]
    with _failures("copying the model", "keep no computed tensors in it"):
        model = copy_module(model).eval()
    with torch.random.fork_rng(devices=[]), context.reporter.spinner("rehearsal"):
        if prune:
            _randomize(model, example)
            model = _prune(context, model, example)
        with _failures(f"evaluating one image with task {context.recipe.task}", "correct the task"):
            _evaluate(context, model)
        _export(quiet, model, example)


def _randomize(model: nn.Module, example: Tensor) -> None:
    """Set shifts and statistics of the norms, so that channels emit constants and deep outputs stay in range."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.bias is not None:
            module.bias.data += 0.1 * torch.randn(module.bias.shape, generator=generator).to(module.bias)
    try:
        recalibrate(model, [example])
    except (PlanError, RuntimeError):
        return  # with the statistics that the model has


def _prune(context: RunContext, model: nn.Module, example: Tensor) -> nn.Module:
    groups = context.dense_groups(model)
    absolute_budget(context, model, groups)
    with _failures(f"slim.importance={context.recipe.slim.importance.name}", "choose another one"):
        search = channel_search(context, model, groups, batches=1)
    limits = zip(search.selector.groups, search.selector.limits, strict=True)
    first = [group for group, limit in limits if limit and group.channels > 1]

    sizes = context.check_sizes(model)

    def attempt(some: Sequence[Group]) -> nn.Module:
        plan = make_plan(model, groups, {group.id: {0} for group in some})
        try:
            return slim(model, plan, example, groups=groups, exact=context.recipe.slim.exact, noise=2, sizes=sizes)[0]
        except PlanError as error:
            # Without training, an output may be constant, or too sensitive for noise.
            if DEAD not in str(error) and "on noise" not in str(error):
                raise
            return apply_plan(copy_module(model), plan, example)

    try:
        return attempt(first)
    except Exception as error:
        if is_disk_failure(error) or is_out_of_memory(error):
            raise
        with _failures(f"backbone {context.recipe.backbone.name}: the equivalence check", "correct the network"):
            attempt([])
        reason, failing = error, first
        # Halves until one group is left, or until groups fail only together.
        while len(failing) > 1:
            for half in (failing[: len(failing) // 2], failing[len(failing) // 2 :]):
                try:
                    attempt(half)
                except Exception as narrower:
                    reason, failing = narrower, half
                    break
            else:
                break
        names = [group.members[0].module for group in failing]
        raise RecipeError(
            f"backbone {context.recipe.backbone.name}: pruning one channel of {join_names(names)} fails "
            f"({_reason(reason)}); keep all channels with slim.ignored_layers=[{', '.join(names)}], or change the code"
        ) from error


def _evaluate(context: RunContext, model: nn.Module) -> None:
    task, dataset = context.task, context.dataset("val")
    image, target = dataset.pair(0)
    metrics = task.make_metrics(dataset.classes)
    metrics.update(task.predict(model, image, context.recipe.data.size), target)
    compute_metrics(metrics)


def _export(context: RunContext, model: nn.Module, example: Tensor) -> None:
    wanted = variants(context.recipe.export)
    with inference(model):
        if not wanted or not torch.isfinite(main_output(model(example))).all():
            return
    # A run folder in memory.
    run: RunDir = WorkerRunDir(Path("rehearsal"), new_state(), None)
    run.write_json("summary.json", {})
    run.write_bytes("slim/model.safetensors", b"")
    exporter = Exporter(context, run, "slim", model, measure=False)
    for variant in wanted:
        key = f"export.{'int8' if variant.int8 else 'preprocess' if variant.preprocess else variant.form}"
        with _failures(key, f"set {key}=false"), tolerance(UNTRAINED_TOLERANCE):
            if variant.int8:
                exporter.quantize(IMAGES)  # what it costs in accuracy is known only after training
            else:
                exporter.write(variant)


@contextmanager
def _failures(what: str, fix: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_failure(error) or is_out_of_memory(error):
            raise
        raise RecipeError(f"{what} fails ({_reason(error)}); {fix}") from error


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, PrunekitError) else f"{type(error).__name__}: {first_line(error)}"
