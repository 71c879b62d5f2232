"""A whole run, or a part of one: what the commands ``run``, ``slim`` and ``finetune`` do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from prunekit.config.schema import Recipe
from prunekit.errors import (
    CheckpointError,
    ExportError,
    Interrupted,
    PrunekitError,
    RecipeError,
    RunError,
    RunFolderError,
)
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import (
    CLASSES,
    DENSE_WEIGHTS,
    load_model,
    newest_model,
    read_recipe,
)
from prunekit.pipeline.preflight import check_classes, check_recipe
from prunekit.pipeline.rehearsal import rehearse
from prunekit.pipeline.stages import STAGE_FUNCTIONS
from prunekit.pipeline.workers import main_process_command, stage_trains
from prunekit.runs.folders import check_usable, is_run_folder
from prunekit.runs.run_dir import DATA, RunDir
from prunekit.runs.stage_order import GRADUAL_PRUNING, STAGES
from prunekit.training.trainer import ReachedPruning
from prunekit.utils import distributed
from prunekit.utils.environment import environment
from prunekit.utils.io import is_disk_failure, is_out_of_memory, write_error
from prunekit.utils.logging import record_logs
from prunekit.utils.progress import Reporter
from prunekit.utils.text import one_line, suggest


@main_process_command
def run_recipe(
    recipe: Recipe,
    out: str | Path,
    console: Console | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start_from: str | None = None,
    until: str | None = None,
) -> Path:
    """Run all stages of a recipe, or those that a run folder still lacks; return the folder.

    Args:
        recipe: from ``recipe.load``.
        out: the run folder.
        console: for progress and the report; by default the terminal.
        resume: continue the run in the folder.
        overwrite: replace it.
        start_from: with ``resume``, repeat this stage and the later ones.
        until: stop before this stage, or where "gradual_pruning" begins within the training; the run can be resumed,
            also with other values of the keys that only later stages read.

    Raises:
        PrunekitError: the run failed; the folder shows how far it came.
        Interrupted: by Ctrl-C or SIGTERM, after the training has saved a checkpoint. Before the folder is touched and
            after the run is complete, a KeyboardInterrupt is raised instead.
    """
    out, console = Path(out), console or Console()
    if overwrite and recipe.init is not None:
        _check_different(Path(recipe.init).expanduser(), out)
    check_usable(out, resume=resume, overwrite=overwrite)
    stages = _stages_until(recipe, until)
    if start_from in STAGES and start_from not in stages:
        raise RecipeError(f"--from {start_from} --until {until}: nothing lies between them; stop before a later stage")
    pending = _pending_stages(out, resume, start_from)
    context = RunContext(recipe, Reporter(console), stop_before_pruning=until == GRADUAL_PRUNING)
    # Before the folder is made, so that a wrong recipe or a damaged image leaves no folder.
    check_recipe(
        context,
        load_data="train" in pending or "finetune" in pending,
        load_init="train" in pending and (overwrite or not (out / "init" / "model.safetensors").is_file()),
        rehearsal=overwrite or not is_run_folder(out),
    )
    with _run_folder(context, out, resume=resume, overwrite=overwrite, repeat_from=start_from) as run:
        _check_not_half_derived(run)
        if start_from is not None:
            run.restart_from(start_from)
        try:
            failed_export = _run_stages(context, run, stages)
        except ReachedPruning:
            return out
        if until is not None:
            if failed_export is not None:
                raise failed_export
            return out
    return _report(out, console, failed_export)


@main_process_command
def slim_run(source: Path, recipe: Recipe, out: Path, console: Console, *, overwrite: bool = False) -> Path:
    """Repeat extract, slim and evaluate on the trained model of another run, without training it; return ``out``.

    Args:
        source: a run folder. Its dense model is slimmed, or its newest where it has none (an imported slim model).
        recipe: that of the source, with changes.
        out: the new run folder.
        console: for progress and the report.
        overwrite: replace the run in ``out``.
    """
    with _derived_run(source, recipe, out, console, "extract", overwrite) as (context, old, run):
        context.reporter.training_epochs.pop("finetune", None)
        part = "dense" if old.has(DENSE_WEIGHTS) else newest_model(old)
        _copy_model(old, run, part, "dense")
        _copy_model(old, run, "baseline")
        _copy_figures(context, old, run, {part: "dense", "baseline": "baseline"})
        run.end("train")
        _run_stages(context, run, ("extract", "slim", "evaluate"))
        run.finish()
    return _report(out, console)


@main_process_command
def finetune_run(source: Path, recipe: Recipe, out: Path, console: Console, *, overwrite: bool = False) -> Path:
    """Fine-tune the slim model of another run, or its dense one where it has no other; then evaluate and export it.

    Args as for ``slim_run``.
    """
    with _derived_run(source, recipe, out, console, "finetune", overwrite) as (context, old, run):
        for name in ("baseline", "dense", "slim"):
            _copy_model(old, run, name)
        _copy(old, run, "layers.json")
        if not run.has("slim/model.safetensors"):
            _copy_model(run, run, "dense", "slim")
        _copy_figures(context, old, run, {part: part for part in ("baseline", "dense", "slim")})
        for part, value in old.read_json("summary.json").items():
            if part in ("kept", "equivalence", "drift"):
                run.update_summary(part, value)
        for stage in ("train", "extract", "slim"):
            run.end(stage)
        failed_export = _run_stages(context, run, STAGES)
    return _report(out, console, failed_export)


@contextmanager
def _derived_run(
    source: Path, recipe: Recipe, out: Path, console: Console, first: str, overwrite: bool
) -> Iterator[tuple[RunContext, RunDir, RunDir]]:
    """Start a run whose first stage begins with the models of another run; yields both folders."""
    _check_different(source, out)
    context = RunContext(recipe, Reporter(console))
    old = RunDir.open(source).require_done({"extract": "train", "finetune": "slim"}[first])
    newest_model(old)
    if first == "finetune":
        _check_teacher(recipe, old)
    check_recipe(context, load_data=True)
    check_classes(context, old)
    if first == "finetune":
        tuned = "slim" if old.has("slim/model.safetensors") else "dense"
        rehearse(context, load_model(old, tuned), prune=False)
    with _run_folder(context, out, overwrite=overwrite) as run:
        run.begin(first)
        _copy(old, run, CLASSES)
        yield context, old, run


def _report(out: Path, console: Console, failed_export: ExportError | None = None) -> Path:
    # Imported here: pandas and Matplotlib take a second, which a command that fails early does not need.
    from prunekit.reporting import report

    report([out], None, console)
    if failed_export is not None:
        raise failed_export
    return out


@contextmanager
def _run_folder(context: RunContext, out: Path, **flags: Any) -> Iterator[RunDir]:
    """Start or resume a run, with its log; errors leave as a PrunekitError, Ctrl-C as Interrupted."""
    recipe, run = context.recipe, None
    try:
        checksums = context.data_checksums
        with RunDir.start(out, recipe.dump(), environment(recipe.seed), checksums=checksums, **flags) as run:
            context.reporter.log_file = out / "run.log"
            if (recipe.data.root or recipe.data.val_root) and run.stage is None:
                run.write_json(DATA, checksums())
            with record_logs(context.reporter.write_log):
                yield run
    except PrunekitError:
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted from stop
    except Exception as error:
        if run is None:
            raise
        if is_disk_failure(error):
            raise write_error(error, error.filename or "a file") from error
        raise RunError(_unexpected(run, error)) from error


def _unexpected(run: RunDir, error: Exception) -> str:
    out_of_memory = is_out_of_memory(error)
    text = one_line(str(error)) or ("out of memory" if out_of_memory else "no message")
    remedy = "continue with --resume once that is fixed"
    if out_of_memory:
        remedy = "free memory and continue with --resume, or start again with a smaller batch_size or data.size"
    stage, kind = run.stage or "start", type(error).__name__
    return f"{stage}: {kind}: {text[:500]}; {remedy}; the traceback is in {run.path / 'run.log'}"


def _run_stages(context: RunContext, run: RunDir, stages: Sequence[str]) -> ExportError | None:
    """Run the stages that are not done; a failed export is returned, since it must not cost the report."""
    failed_export = None
    for stage in stages:
        if run.is_done(stage):
            context.reporter.info(f"{stage}: already done")
            continue
        run.begin(stage)
        start = time.perf_counter()
        try:
            with context.reporter.stage(stage):
                if stage_trains(stage, context.recipe):
                    distributed.send_command(stage)
                STAGE_FUNCTIONS[stage](context, run)
        except BaseException as error:
            # The first error is the one to report.
            with suppress(CheckpointError, RunError):
                run.add_seconds(stage, round(time.perf_counter() - start, 3))
            if stage != "export" or not isinstance(error, ExportError):
                raise
            failed_export = error
            continue
        run.add_seconds(stage, round(time.perf_counter() - start, 3))
        run.end(stage)
    return failed_export


def _pending_stages(out: Path, resume: bool, start_from: str | None) -> tuple[str, ...]:
    if start_from is not None and start_from not in STAGES:
        hint = suggest(start_from, STAGES, otherwise="")
        raise RecipeError(f"--from {start_from}: no such stage{hint} ({', '.join(STAGES)})")
    if not (resume and is_run_folder(out)):
        if start_from not in (None, STAGES[0]):
            raise PrunekitError(f"--from {start_from} needs a run whose earlier stages are done, and {out} holds none")
        return STAGES
    done = RunDir.open(out).done
    first = STAGES.index(start_from) if start_from else len(STAGES)
    return tuple(stage for index, stage in enumerate(STAGES) if index >= first or stage not in done)


def _stages_until(recipe: Recipe, until: str | None) -> tuple[str, ...]:
    """The stages to run; RecipeError if there is nothing by the name ``until``."""
    if until is None:
        return STAGES
    if until == GRADUAL_PRUNING:
        if not recipe.train.gradual_pruning.start:
            raise RecipeError(f"--until {until}: needs train.gradual_pruning.start above 0")
        if distributed.world_size() > 1:
            raise RecipeError(f"--until {until}: needs a single process")
        return STAGES[:1]
    names = (*STAGES[1:], GRADUAL_PRUNING)
    if until not in names:
        raise RecipeError(f"--until {until}: no such stage{suggest(until, names, otherwise='')} ({', '.join(names)})")
    return STAGES[: STAGES.index(until)]


def _copy(source: RunDir, target: RunDir, name: str, to: str | None = None) -> None:
    if source.has(name):
        target.write_bytes(to or name, source.read_bytes(name))


def _copy_model(source: RunDir, target: RunDir, name: str, to: str | None = None) -> None:
    for file in ("plan.json", "model.safetensors"):
        _copy(source, target, f"{name}/{file}", f"{to or name}/{file}")


def _copy_figures(context: RunContext, old: RunDir, run: RunDir, parts: dict[str, str]) -> None:
    """Write the sizes of copied models (old name → new), and their metrics if the data are the same."""
    summary = old.read_json("summary.json")
    data, old_data = (recipe.data.model_dump(exclude={"cache"}) for recipe in (context.recipe, read_recipe(old)))
    for old_part, part in parts.items():
        if not run.has(f"{part}/model.safetensors"):
            continue
        context.measure(run, part, load_model(run, part))
        metrics = summary.get(old_part, {}).get("metrics")
        if data == old_data and metrics:
            run.update_summary(part, {**run.read_json("summary.json")[part], "metrics": metrics})


def _check_teacher(recipe: Recipe, source: RunDir) -> None:
    distill = recipe.finetune.distill
    if distill.weight and not source.has(f"{distill.teacher}/model.safetensors"):
        raise RecipeError(
            f"finetune.distill.teacher: {source.path} has no {distill.teacher} model; set finetune.distill.weight=0"
        )


def _check_different(source: Path, out: Path) -> None:
    if source.resolve() == out.resolve():
        raise RunFolderError(f"{out} is the run to begin from, and would be replaced; choose another --out DIR")


def _check_not_half_derived(run: RunDir) -> None:
    # Where slim or finetune was stopped before it had copied the models, a stage has begun before its time.
    earlier = STAGES[: STAGES.index(run.stage)] if run.stage else ()
    if any(not run.is_done(stage) for stage in earlier if stage != "export"):
        raise RunFolderError(
            f"{run.path} was to begin with the models of another run, and was stopped before they were copied, or has "
            "lost its state.json; repeat the command that made it, with --overwrite"
        )
