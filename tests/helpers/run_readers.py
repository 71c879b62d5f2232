"""The commands that read a run folder, as functions that return their result."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from helpers.toy_run import outcome, quiet
from prunekit.commands.bench import bench_run
from prunekit.commands.evaluate import evaluate
from prunekit.commands.groups import dump, inspect_groups
from prunekit.commands.import_model import derived_recipe
from prunekit.commands.predict import predict
from prunekit.pipeline.export import export_run
from prunekit.pipeline.runner import finetune_run, run_recipe, slim_run
from prunekit.reporting import report


@dataclass
class RunSet:
    """The test data: two complete runs and two interrupted ones."""

    photos: Path
    recipe: object
    whole: Path
    other: Path
    broken: Path
    other_broken: Path


def printed_report(run: Path, run_set: RunSet) -> str:
    console = Console(width=400, file=io.StringIO(), color_system=None)
    report([run], run.parent / "report", console)
    return console.file.getvalue().replace(str(run.parent), "")


def predicted(run: Path, run_set: RunSet) -> bytes:
    (table,) = predict(run, sorted(run_set.photos.rglob("*.png")), run.parent / "maps", console=quiet())
    return table.read_bytes()


def _eval(run: Path, run_set: RunSet) -> object:
    entries = evaluate(run, [f"again={run_set.photos}"], quiet())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def _bench(run: Path, run_set: RunSet) -> object:
    return bench_run(run, quiet(), forms="eager", threads="1")


def _slim(run: Path, run_set: RunSet) -> object:
    out = slim_run(run, derived_recipe(run, ["slim.threshold=0.45"]), run.parent / "slim", quiet())
    return outcome(out)


def _finetune(run: Path, run_set: RunSet) -> object:
    out = finetune_run(run, derived_recipe(run, ["finetune.batch_size=5"]), run.parent / "finetuned", quiet())
    return outcome(out)


def _resumed(run: Path, run_set: RunSet, start_from: str | None = None) -> object:
    """Resume the run and return its outcome, or the problems that its report names."""
    console = Console(width=400, file=io.StringIO(), color_system=None)
    run_recipe(run_set.recipe, run, console, resume=True, start_from=start_from)
    problems = [line for line in console.file.getvalue().splitlines() if line.startswith(("problem in", "missing in"))]
    return "\n".join(problems) or outcome(run)


READERS: dict[str, Callable[[Path, RunSet], object]] = {
    "report": printed_report,
    "predict": predicted,
    "groups": lambda run, run_set: dump(inspect_groups(str(run))).replace(str(run), ""),
    "eval": _eval,
    "export": lambda run, run_set: [path.read_bytes() for path in export_run(run, "onnx", quiet())],
    "bench": _bench,
    "slim": _slim,
    "finetune": _finetune,
    "resume": _resumed,
    "again": lambda run, run_set: _resumed(run, run_set, "finetune"),
}
