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
class Bed:
    """The test data: two complete runs and two interrupted ones."""

    photos: Path
    recipe: object
    whole: Path
    other: Path
    broken: Path
    other_broken: Path


def told(run: Path, bed: Bed) -> str:
    console = Console(width=400, file=io.StringIO(), color_system=None)
    report([run], run.parent / "report", console)
    return console.file.getvalue().replace(str(run.parent), "")


def predicted(run: Path, bed: Bed) -> bytes:
    (table,) = predict(run, sorted(bed.photos.rglob("*.png")), run.parent / "maps", console=quiet())
    return table.read_bytes()


def _eval(run: Path, bed: Bed) -> object:
    entries = evaluate(run, [f"again={bed.photos}"], quiet())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def _bench(run: Path, bed: Bed) -> object:
    return bench_run(run, quiet(), forms="eager", threads="1")


def _slim(run: Path, bed: Bed) -> object:
    out = slim_run(run, derived_recipe(run, ["slim.threshold=0.45"]), run.parent / "slim", quiet())
    return outcome(out)


def _finetune(run: Path, bed: Bed) -> object:
    out = finetune_run(run, derived_recipe(run, ["finetune.batch_size=5"]), run.parent / "finetuned", quiet())
    return outcome(out)


def _gone_on(run: Path, bed: Bed, start_from: str | None = None) -> object:
    """Resume the run and return its outcome, or the problems that its report names."""
    console = Console(width=400, file=io.StringIO(), color_system=None)
    run_recipe(bed.recipe, run, console, resume=True, start_from=start_from)
    wrong = [one for one in console.file.getvalue().splitlines() if one.startswith(("problem in", "missing in"))]
    return "\n".join(wrong) or outcome(run)


READERS: dict[str, Callable[[Path, Bed], object]] = {
    "report": told,
    "predict": predicted,
    "groups": lambda run, bed: dump(inspect_groups(str(run))).replace(str(run), ""),
    "eval": _eval,
    "export": lambda run, bed: [path.read_bytes() for path in export_run(run, "onnx", quiet())],
    "bench": _bench,
    "slim": _slim,
    "finetune": _finetune,
    "resume": _gone_on,
    "again": lambda run, bed: _gone_on(run, bed, "finetune"),
}
