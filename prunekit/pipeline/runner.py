"""A run from top to bottom, and the parts of one: what the commands ``run``, ``slim`` and ``finetune`` do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from prunekit.config import registry
from prunekit.config.schema import Recipe
from prunekit.errors import CheckpointError, Interrupted, PrunekitError, RecipeError, RunError, RunFolderError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import CLASSES, SHRUNK, initial_model, load_model, newest_model, read_recipe, trained_plan
from prunekit.pipeline.stages import STAGE_FUNCTIONS
from prunekit.pipeline.workers import main_process_command, stage_trains
from prunekit.pruning.plan import Plan
from prunekit.reporting import report
from prunekit.runs.run_dir import RunDir, is_run_folder
from prunekit.runs.stage_order import STAGES
from prunekit.utils import distributed
from prunekit.utils.environment import environment
from prunekit.utils.io import is_disk_failure, write_error
from prunekit.utils.logging import record_logs
from prunekit.utils.progress import Reporter

BASELINE = "baseline/model.safetensors"


@main_process_command
def run_recipe(
    recipe: Recipe,
    out: str | Path,
    console: Console | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start_from: str | None = None,
) -> Path:
    """Run a recipe from its first stage, or from where its folder stands, to the last.

    Args:
        recipe: from ``recipe.load``.
        out: the run folder.
        console: for progress and the report; by default the terminal.
        resume: go on with the run that the folder holds.
        overwrite: replace it.
        start_from: with ``resume``, do this stage and the later ones again.

    Raises:
        PrunekitError: what went wrong; the folder then says how far the run came.
        Interrupted: by Ctrl-C or SIGTERM, behind the first of which a training saves its state; as a KeyboardInterrupt
            before the folder is touched and after the run is complete.
    """
    out, console = Path(out), console or Console()
    if overwrite and recipe.init is not None:
        _elsewhere(Path(recipe.init).expanduser(), out)
    pending = _pending(out, resume, start_from)
    work = RunContext(recipe, Reporter(console))
    # Before the folder is made, so that a wrong recipe or a broken image leaves nothing behind.
    work.rehearse(
        load=any(stage in pending for stage in ("train", "finetune")),
        begin="train" in pending and (overwrite or not (out / "init" / "model.safetensors").is_file()),
    )
    with _begun(work, out, resume=resume, overwrite=overwrite) as run:
        _not_half_derived(run)
        if start_from is not None:
            run.restart_from(start_from)
        _run_stages(work, run, STAGES)
    report([out], None, console)
    return out


@main_process_command
def slim_run(source: Path, recipe: Recipe, out: Path, console: Console, *, overwrite: bool = False) -> Path:
    """Extract and slim once more from what another run has trained, with another threshold, say; no training.

    Args:
        source: a run folder: its dense model is taken or, where it has none (an imported slim model), its slim one.
        recipe: the source's, with what is to be different.
        out: the new run folder.

    Raises:
        PrunekitError: as ``run_recipe``.
    """
    _elsewhere(source, out)
    work = RunContext(recipe, Reporter(console))
    work.reporter.training_epochs.pop("finetune", None)  # that one does not come
    old = RunDir.open(source).settled("train")
    part = "dense" if old.has("dense/model.safetensors") else newest_model(old)
    work.rehearse(load=True)
    work.agree(old)
    with _begun(work, out, overwrite=overwrite) as run:
        run.begin("extract")
        _copy(old, run, f"{part}/model.safetensors", "dense/model.safetensors")
        for name in (CLASSES, BASELINE):
            _copy(old, run, name, name)
        if part == "dense":
            _copy(old, run, SHRUNK, SHRUNK)
        _copy(old, run, "init.json" if part == "dense" else "plan.json", "init.json")
        _adopt(work, old, run, {part: "dense", "baseline": "baseline"})
        run.end("train")
        _run_stages(work, run, ("extract", "slim"))
        run.finish()
    report([out], None, console)
    return out


@main_process_command
def finetune_run(source: Path, recipe: Recipe, out: Path, console: Console, *, overwrite: bool = False) -> Path:
    """Fine-tune the slim model of another run (or its dense one, where it has no other), evaluate and export it.

    Args and errors as for ``slim_run``.
    """
    _elsewhere(source, out)
    work = RunContext(recipe, Reporter(console))
    old = RunDir.open(source).settled("slim")
    newest_model(old)
    _has_teacher(recipe, old)
    work.rehearse(load=True)
    work.agree(old)
    with _begun(work, out, overwrite=overwrite) as run:
        run.begin("finetune")
        weights = (BASELINE, "dense/model.safetensors", "slim/model.safetensors")
        for name in (*weights, CLASSES, "init.json", SHRUNK, "plan.json", "layers.json"):
            _copy(old, run, name, name)
        if not run.has("slim/model.safetensors"):
            # Nothing more is cut from a dense model that was never slimmed.
            _copy(run, run, "dense/model.safetensors", "slim/model.safetensors")
            run.write_json("plan.json", (trained_plan(run) or Plan()).to_json())
        _adopt(work, old, run, {part: part for part in ("baseline", "dense", "slim")})
        summary = old.read_json("summary.json")
        for part in ("kept", "equivalence", "drift"):
            if part in summary:
                run.update_summary(part, summary[part])
        for stage in ("train", "extract", "slim"):
            run.end(stage)
        _run_stages(work, run, STAGES)
    report([out], None, console)
    return out


@contextmanager
def _begun(work: RunContext, out: Path, **flags: bool) -> Iterator[RunDir]:
    """The folder of a run that is made or taken up, and whose log gets all that is said and what breaks the run off.

    Raises:
        PrunekitError: as ``RunDir.start``, or what the stages raise; for what they did not foresee a RunError.
        Interrupted: instead of a KeyboardInterrupt.
    """
    recipe, run = work.recipe, None
    try:
        with RunDir.start(out, recipe.dump(), environment(recipe.seed), **flags) as run:
            work.reporter.log_file = out / "run.log"
            with record_logs(work.reporter.write_log):
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
        raise RunError(_unforeseen(run, error)) from error


def _unforeseen(run: RunDir, error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    # Libraries have no type for it in common.
    memory = isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
    mend = (
        "free memory and go on with --resume, or start again with a smaller batch_size or data.size"
        if memory
        else "go on with --resume when that is mended"
    )
    kind = type(error).__name__
    return f"{run.stage or 'start'}: {kind}: {text[:500]}; {mend}; where it happened is in {run.path / 'run.log'}"


def _run_stages(work: RunContext, run: RunDir, stages: Sequence[str]) -> None:
    for stage in stages:
        if run.is_done(stage):
            work.reporter.info(f"{stage}: done before")
            continue
        run.begin(stage)
        began = time.perf_counter()
        try:
            with work.reporter.stage(stage):
                if stage_trains(stage, work.recipe):
                    distributed.send_command(stage)
                STAGE_FUNCTIONS[stage](work, run)
        except BaseException:
            # What went wrong first is what counts.
            with suppress(CheckpointError):
                run.add_seconds(stage, round(time.perf_counter() - began, 3))
            raise
        run.add_seconds(stage, round(time.perf_counter() - began, 3))
        run.end(stage)


def _adopt(work: RunContext, old: RunDir, run: RunDir, parts: dict[str, str]) -> None:
    """Take over the figures of models that were copied: their sizes are measured at the new recipe's image size, their
    metrics hold on the same data only."""
    summary = old.read_json("summary.json")
    theirs, ours = (recipe.data.model_dump(exclude={"cache"}) for recipe in (read_recipe(old), work.recipe))
    same_data = theirs == ours
    for theirs, ours in parts.items():
        if not run.has(f"{ours}/model.safetensors"):
            continue
        work.measure(run, ours, initial_model(run, work.recipe) if ours == "dense" else load_model(run, ours))
        metrics = summary.get(theirs, {}).get("metrics")
        if same_data and metrics:
            run.update_summary(ours, {**run.read_json("summary.json")[ours], "metrics": metrics})


def _has_teacher(recipe: Recipe, source: RunDir) -> None:
    """Refuse to fine-tune by a model that the run to begin from does not have."""
    distill = recipe.finetune.distill
    if distill.weight and not source.has(f"{distill.teacher}/model.safetensors"):
        raise RecipeError(
            f"finetune.distill.teacher: {source.path} has no {distill.teacher} model; set finetune.distill.weight=0"
        )


def _elsewhere(source: Path, out: Path) -> None:
    """Refuse to replace the very run that is to be read."""
    if source.resolve() == out.resolve():
        raise RunFolderError(f"{out} is the run to begin from, and would be replaced; choose another --out DIR")


def _not_half_derived(run: RunDir) -> None:
    """Refuse to train what was to be copied: a stage has begun and one before it is not done where ``slim`` and
    ``finetune`` were stopped before they had their models."""
    if run.stage is not None and any(not run.is_done(stage) for stage in STAGES[: STAGES.index(run.stage)]):
        raise RunFolderError(
            f"{run.path} was to begin with the models of another run, and was stopped before it had them; give the "
            "command that made it again, with --overwrite"
        )


def _copy(source: RunDir, target: RunDir, name: str, to: str) -> None:
    """Copy a file between run folders, its checksum held against it; nothing where it is not there."""
    if source.has(name):
        target.write_bytes(to, source.read_bytes(name))


def _pending(out: Path, resume: bool, start_from: str | None) -> tuple[str, ...]:
    """The stages that will run."""
    if start_from is not None and start_from not in STAGES:
        near = registry.closest_match(start_from, list(STAGES))
        raise RecipeError(
            f"--from {start_from}: no such stage"
            + (f", did you mean {near!r}?" if near else "")
            + f" ({', '.join(STAGES)})"
        )
    if not (resume and is_run_folder(out)):
        if start_from not in (None, STAGES[0]):
            raise PrunekitError(f"--from {start_from} needs a run that came so far, and {out} holds none")
        return STAGES
    done = RunDir.open(out).done
    first = STAGES.index(start_from) if start_from else len(STAGES)
    return tuple(stage for index, stage in enumerate(STAGES) if index >= first or stage not in done)
