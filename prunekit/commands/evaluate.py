"""``prunekit eval``: measure a run's model on other data sets, by the published protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from prunekit.commands.results import open_to_write, simple_table, write_result
from prunekit.config.schema import Recipe
from prunekit.data.datasets import ImageDataset
from prunekit.errors import CheckpointError, DataError, RunFolderError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import choose_model, load_model, read_recipe, read_task
from prunekit.pipeline.preflight import check_classes
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import format_problem, is_newer
from prunekit.utils.progress import Reporter
from prunekit.utils.text import plural

EVAL, FORMAT = "eval.json", 1
VALIDATION = "validation"  # name of the run's own set
MIN_SIZE = 16  # pixels; a network with four halvings needs as many
OnError = Literal["raise", "skip"]


def evaluate(
    path: str | Path,
    data: Sequence[str],
    console: Console,
    *,
    model: str | None = None,
    size: int | None = None,
    own_size: bool = False,
    batch_size: int = 16,
    on_error: OnError = "raise",
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure a run's model on data sets, print a table and add the results to ``eval.json``.

    If the model has no metrics in ``summary.json`` yet (it was imported, for example), those of the first set at the
    recipe's size are added there.

    Args:
        data: ``NAME=FOLDER`` for each set; empty for the run's own validation set. For saliency, the folder holds
            images/ and GT/; for classification, one folder of images for each class.
        model: "baseline", "dense", "slim" or "finetuned"; None for the run's newest.
        size: side of the square that images are resized to; None for that of the recipe.
        own_size: use each image's own size instead, rounded up to a multiple of 16.
        on_error: "skip" leaves out and counts images that cannot be read or have no mask or class.
        out: folder for ``eval.json``; nothing is written into the run folder. None for the run folder.

    Returns:
        the entries of ``eval.json`` of these sets: name, folder, model, mode, images, skipped, metrics and seconds.

    Raises:
        DataError: an argument, a folder or an image cannot be used. Folders are checked before a model runs.
        PrunekitError: the run folder cannot be used.
    """
    folders = _parse_sets(data)
    if own_size and size is not None:
        raise DataError("--size and --own-size exclude each other; give one of them")
    if batch_size < 1:
        raise DataError(f"--batch-size {batch_size}: must be at least 1")
    if on_error not in ("raise", "skip"):
        raise DataError(f"--on-error {on_error}: choose raise or skip")
    reporter = Reporter(console)
    with closing(open_to_write(path, out)) as run:
        file = (out or run.path) / EVAL
        saved = _read_results(run, out, file)
        name, recipe = choose_model(run, model), read_recipe(run)
        min_size = min(MIN_SIZE, recipe.data.size)
        if size is not None and size < min_size:
            raise DataError(f"--size {size}: must be at least {min_size}")
        side = None if own_size else size or recipe.data.size
        task, classes = read_task(run, recipe)
        datasets: dict[str, ImageDataset] = {}
        for key, folder in folders.items():
            with _errors_of(f"--data {key}"):
                datasets[key] = task.read_folder(folder, on_error, classes)
        if not datasets:
            with _errors_of("the run's validation set"):
                datasets[VALIDATION] = _own_set(run, recipe, on_error, reporter)
                folders[VALIDATION] = str(recipe.data.val_root or recipe.data.root or recipe.data.name)
        network = load_model(run, name, recipe).to(PartialState().device)
        entries, notes = [], []
        for key, dataset in datasets.items():
            start, count = time.perf_counter(), len(dataset)
            where = f"--data {key}" if data else "the run's validation set"
            with _errors_of(where), closing(reporter.progress_bar(key)) as progress:
                try:
                    result = task.evaluate(network, dataset, side, batch_size, progress)
                except DataError as error:
                    if len(dataset):
                        raise
                    raise DataError(
                        f"none of the {count} {dataset.unit} in {folders[key]} can be read; copy the data set again"
                    ) from error
            entry = {
                "name": key,
                "folder": folders[key],
                "model": name,
                "mode": "own size" if side is None else f"size {side}",
                "images": len(dataset),
                "skipped": dataset.skipped,
                "metrics": result.metrics,
                "seconds": round(time.perf_counter() - start, 3),
            }
            entries.append(entry)
            notes += [f"{key}: {plural(dataset.skipped, 'image')} skipped"] if dataset.skipped else []
            notes += [f"{key}: {result.warning}"] if result.warning else []
            saved[_key(entry)] = entry
            write_result(run, out, EVAL, {"format": FORMAT, "sets": list(saved.values())})
            if side == recipe.data.size and out is None:
                _update_summary(run, name, result.metrics)
    names = list(dict.fromkeys(key for entry in entries for key in entry["metrics"]))
    table = simple_table(["set"], ["images", *names])
    for entry in entries:
        values = [f"{entry['metrics'][key]:.4f}" for key in names]
        table.add_row(*map(Text, (entry["name"], f"{entry['images']:,}", *values)))
    console.print(Text(f"{name} model, {entries[0]['mode']}"))
    console.print(table)
    for line in (*notes, f"saved to {file}"):
        console.print(Text(line), soft_wrap=True)
    return entries


def _own_set(run: RunDir, recipe: Recipe, on_error: OnError, reporter: Reporter) -> ImageDataset:
    if on_error == "skip":
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_error": "skip"})})
    context = RunContext(recipe, reporter)
    check_classes(context, run)
    return context.dataset("val")


def _parse_sets(data: Sequence[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for item in data:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise DataError(f"--data {item}: give NAME=FOLDER, such as ECSSD=~/data/ECSSD")
        if name in folders:
            raise DataError(f"--data {item}: the name {name} is already used for {folders[name]}; choose another name")
        folders[name] = folder
    return folders


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Name the data set in errors, and this command's option in place of the recipe key."""
    try:
        yield
    except DataError as error:
        message = str(error).replace("set data.on_error=skip", "give --on-error skip")
        raise DataError(f"{what}: {message}") from error


def _read_results(run: RunDir, out: Path | None, file: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    if not file.exists():
        return {}
    try:
        content = run.read_json(EVAL) if out is None else json.loads(file.read_bytes())
        if (problem := format_problem(content["format"], FORMAT)) is not None:
            if is_newer(content["format"], FORMAT):
                raise RunFolderError(
                    f"{file} {problem}; pip install --upgrade prunekit, or remove it and evaluate again"
                )
            raise ValueError(problem)
        return {_key(entry): entry for entry in content["sets"]}
    except (CheckpointError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = "is damaged" if out is not None else "is damaged or does not match state.json"
        raise CheckpointError(f"{file} {problem}; remove it and evaluate its sets again") from error


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["name"], entry["model"], entry["mode"]


def _update_summary(run: RunDir, model: str, metrics: dict[str, float]) -> None:
    summary = run.read_json("summary.json") if run.has("summary.json") else {}
    part = summary.get(model)
    if isinstance(part, dict) and not part.get("metrics"):
        run.update_summary(model, {**part, "metrics": metrics})
