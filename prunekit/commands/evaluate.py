"""A run's model on data sets that the run has not seen, by the protocol that published figures follow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunekit.data.datasets import ImageDataset
from prunekit.errors import CheckpointError, DataError, RunFolderError
from prunekit.pipeline.models import MODELS, load_model, newest_model, read_recipe, read_task
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.base import Task
from prunekit.utils.io import format_problem, is_newer
from prunekit.utils.progress import Reporter

EVAL, FORMAT = "eval.json", 1
SMALLEST = 16  # pixels; below it a network with four halvings has nothing left
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
) -> list[dict[str, Any]]:
    """Measure a run's model on folders of the data its task needs, print a table and note the figures in ``eval.json``.

    The figures of the published protocol also go into the summary of a model that has none yet, such as one that was
    imported; the first set's.

    Args:
        path: the run folder.
        data: ``NAME=FOLDER`` for each set, all of which is taken: for saliency a folder that holds images/ and GT/, for
            classification one that holds a folder of images for each class.
        console: where the table goes.
        model: "baseline", "dense", "slim" or "finetuned"; None for the last that the run has.
        size: side of the square that the model sees; None for that of the run's recipe.
        own_size: the model sees each image at its own size, rounded up to a multiple of 16, instead.
        batch_size: images in hand at once.
        on_error: ``skip`` leaves out, and counts, images without mask or class and files that cannot be read.

    Returns:
        what ``eval.json`` now holds of each of these sets: name, folder, model, mode, images, skipped, metrics and
        seconds.

    Raises:
        DataError: an argument, a folder or an image cannot be used; folders are looked at before a model runs.
        PrunekitError: the run folder cannot be used.
    """
    given = _sets(data)
    if own_size and size is not None:
        raise DataError("--size and --own-size exclude each other; give one of them")
    if batch_size < 1:
        raise DataError(f"--batch-size {batch_size}: give 1 or more")
    if model is not None and model not in MODELS:
        raise DataError(f"--model {model}: there are {', '.join(MODELS)}")
    if on_error not in ("raise", "skip"):
        raise DataError(f"--on-error {on_error}: there are raise, skip")
    with closing(RunDir.open(path, write=True)) as run:
        held = _read(run)
        name = model or newest_model(run)
        recipe = read_recipe(run)
        least = min(SMALLEST, recipe.data.size)
        if size is not None and size < least:
            raise DataError(f"--size {size}: give {least} or more")
        side = None if own_size else size or recipe.data.size
        task, classes = read_task(run, recipe)
        sets = {key: _pairs(task, key, folder, on_error, classes) for key, folder in given.items()}
        network = load_model(run, name, recipe).to(PartialState().device)
        reporter = Reporter(console)
        mode = "own size" if side is None else f"size {side}"
        entries = []
        for key, pairs in sets.items():
            began = time.perf_counter()
            metrics = _measure(task, network, key, given[key], pairs, side, batch_size, reporter)
            entry = {
                "name": key,
                "folder": given[key],
                "model": name,
                "mode": mode,
                "images": len(pairs),
                "skipped": pairs.skipped,
                "metrics": metrics,
                "seconds": round(time.perf_counter() - began, 3),
            }
            entries.append(entry)
            held = _with(held, entry)
            run.write_json(EVAL, {"format": FORMAT, "sets": held})
            if side == recipe.data.size:
                _into_summary(run, name, metrics)
    _print(entries, run.path / EVAL, console)
    return entries


def _sets(data: Sequence[str]) -> dict[str, str]:
    """Name → folder as given."""
    found: dict[str, str] = {}
    for item in data:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise DataError(f"--data {item}: give NAME=FOLDER, such as ECSSD=~/data/ECSSD")
        if name in found:
            raise DataError(f"--data {item}: the name {name} is taken by {found[name]}; give each set its own")
        found[name] = folder
    if not found:
        raise DataError("no data set is given; add --data NAME=FOLDER")
    return found


def _pairs(task: Task, name: str, folder: str, on_error: OnError, classes: Sequence[str]) -> ImageDataset:
    """All of a folder."""
    try:
        return task.read_folder(folder, on_error, classes)
    except DataError as error:
        raise _told(name, error) from error


def _measure(
    task: Task,
    network: Any,
    name: str,
    folder: str,
    pairs: ImageDataset,
    side: int | None,
    batch_size: int,
    reporter: Reporter,
) -> dict[str, float]:
    counter = reporter.progress_bar(name)
    count = len(pairs)
    try:
        return task.evaluate(network, pairs, side, batch_size, counter).metrics
    except DataError as error:
        if not len(pairs):
            raise DataError(
                f"--data {name}: none of the {count} {pairs.unit} in {folder} can be read; copy them again"
            ) from error
        raise _told(name, error) from error
    finally:
        counter.close()


def _told(name: str, error: DataError) -> DataError:
    """The same in the words of this command, which has no recipe to set keys of."""
    return DataError(f"--data {name}: {error}".replace("set data.on_error=skip", "give --on-error skip"))


def _read(run: RunDir) -> list[dict[str, Any]]:
    """The entries of ``eval.json``."""
    if not run.has(EVAL):
        return []
    try:
        held = run.read_json(EVAL)
        if (fault := format_problem(held["format"], FORMAT)) is not None:
            if is_newer(held["format"], FORMAT):
                raise RunFolderError(
                    f"{run.path / EVAL} {fault}; pip install --upgrade prunekit, or remove it and evaluate again"
                )
            raise ValueError(fault)
        entries = list(held["sets"])
        {_key(entry) for entry in entries}
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run.path / EVAL} is not as prunekit writes it; remove it and evaluate its sets again"
        ) from error
    return entries


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["name"], entry["model"], entry["mode"]


def _with(held: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with this one in the place of the one it replaces, or at the end."""
    by_key = {_key(one): one for one in held}
    return list({**by_key, _key(entry): entry}.values())


def _into_summary(run: RunDir, part: str, metrics: dict[str, float]) -> None:
    summary = run.read_json("summary.json") if run.has("summary.json") else {}
    held = summary.get(part)
    if isinstance(held, dict) and not held.get("metrics"):
        run.update_summary(part, {**held, "metrics": metrics})


def _print(entries: Sequence[dict[str, Any]], path: Path, console: Console) -> None:
    names = list(dict.fromkeys(key for entry in entries for key in entry["metrics"]))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("set", overflow="fold")
    for title in ("images", *names):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        figures = [f"{entry['metrics'][key]:.4f}" for key in names]
        table.add_row(*map(Text, (entry["name"], f"{entry['images']:,}", *figures)))
    console.print(Text(f"{entries[0]['model']} model, {entries[0]['mode']}"))
    console.print(table)
    for entry in entries:
        if entry["skipped"]:
            console.print(Text(f"{entry['name']}: {entry['skipped']} left out"), soft_wrap=True)
    console.print(Text(f"written: {path}"), soft_wrap=True)
