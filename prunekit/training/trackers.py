"""Experiment tracking with TensorBoard (``log: tensorboard``), through Accelerate's tracker.

Epochs are counted over all trainings of a run. When a run resumes, TensorBoard purges what was logged after the
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit.config.schema import Recipe
from prunekit.errors import RecipeError
from prunekit.utils.io import write_error
from prunekit.utils.progress import training_epochs

FOLDER = "tensorboard"  # in the run folder


def check_tracker(recipe: Recipe) -> None:
    """Raise RecipeError if ``log`` needs a package that is not installed."""
    if recipe.log != "tensorboard":
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f'log: tensorboard needs a package that cannot be imported ({error}); pip install "prunekit[tensorboard]", '
            "or set log: none"
        ) from error


@contextmanager
def track(recipe: Recipe, folder: Path, stage: str, first_epoch: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that logs a row of ``metrics.jsonl``, as ``<stage>/<name>`` at the epoch of the run.

    Args:
        recipe: of the run; logged as hyperparameters.
        folder: of the run.
        stage: name of the training.
        first_epoch: its finished epochs; later ones that were logged are purged.

    Raises:
        CheckpointError: the file system failed.
    """
    if recipe.log == "none":
        yield lambda row: None
        return
    from accelerate.tracking import TensorBoardTracker

    epochs = training_epochs(recipe.train.epochs, recipe.finetune.epochs, recipe.slim.steps, recipe.baseline)
    offset = sum(list(epochs.values())[: list(epochs).index(stage)])
    is_new = not any((folder / FOLDER).glob("events.*"))
    with _write_errors(folder):
        tracker = TensorBoardTracker(FOLDER, logging_dir=folder, purge_step=offset + first_epoch + 1)
        tracker.start()
    try:
        with _write_errors(folder):
            if is_new:
                _log_hyperparameters(tracker, recipe)

        def log(row: dict[str, Any]) -> None:
            with _write_errors(folder):
                tracker.log(scalars(row), step=offset + row["epoch"])

        yield log
    finally:
        with _write_errors(folder):
            tracker.finish()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of ``metrics.jsonl``: ``train/loss``, ``train/metrics/mae`` and so on."""
    kept = {key: value for key, value in row.items() if key not in ("stage", "epoch", "step", "of")}
    values = flatten(kept, "/").items()
    return {f"{row['stage']}/{name}": float(value) for name, value in values if not isinstance(value, str)}


def flatten(tree: dict[str, Any], separator: str = ".") -> dict[str, bool | int | float | str]:
    """Return nested mappings as one, with lists as JSON and without values that are None."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}{separator}{name}": inner for name, inner in flatten(value, separator).items()}
        elif isinstance(value, list):
            flat[key] = json.dumps(value)
        elif value is not None:
            flat[key] = value
    return flat


def _log_hyperparameters(tracker: Any, recipe: Recipe) -> None:
    # The tracker's store_init_configuration would put them into a run without metrics.
    from torch.utils.tensorboard.summary import hparams

    _, session_start, _ = hparams(flatten(recipe.model_dump(mode="json")), {})
    tracker.tracker.file_writer.add_summary(session_start)
    tracker.tracker.flush()


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, folder / FOLDER) from error
