"""What a run writes for others to watch it by: ``log: tensorboard``, through Accelerate's tracker.

The epochs are counted over all trainings of the run, so that one number stands for one moment: of what an earlier
process has tracked beyond the state that a run goes on from, TensorBoard drops the rest by itself.
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
    """Raise RecipeError where ``log`` needs what is not installed."""
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
def track(recipe: Recipe, folder: Path, stage: str, first: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Track one training, as the recipe says; yields what takes the lines of ``metrics.jsonl``.

    Scalars are named ``<stage>/<figure>``; their step is the epoch, counted over all trainings of the recipe.

    Args:
        recipe: of the run; its keys are the hyperparameters.
        folder: of the run.
        stage: the training.
        first: how many of its epochs are done; what was tracked of later ones is dropped.

    Raises:
        CheckpointError: the system refused.
    """
    if recipe.log == "none":
        yield lambda line: None
        return
    from accelerate.tracking import TensorBoardTracker

    before = _before(recipe, stage)
    fresh = not any((folder / FOLDER).glob("events.*"))
    with _refusals(folder):
        tracker = TensorBoardTracker(FOLDER, logging_dir=folder, purge_step=before + first + 1)
        tracker.start()
    try:
        with _refusals(folder):
            if fresh:
                _hyperparameters(tracker, recipe)

        def take(line: dict[str, Any]) -> None:
            with _refusals(folder):
                tracker.log(scalars(line), step=before + line["epoch"])

        yield take
    finally:
        with _refusals(folder):
            tracker.finish()


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line of ``metrics.jsonl``: ``train/loss``, ``train/size/params``, ``train/metrics/mae`` …"""
    kept = {key: value for key, value in line.items() if key not in ("stage", "epoch", "step", "of")}
    return {
        f"{line['stage']}/{name}": float(value) for name, value in flat(kept, "/").items() if not isinstance(value, str)
    }


def flat(tree: dict[str, Any], joint: str = ".") -> dict[str, bool | int | float | str]:
    """Nested mappings as one, lists as JSON; what is None is left out."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}{joint}{name}": inner for name, inner in flat(value, joint).items()}
        elif isinstance(value, list):
            found[key] = json.dumps(value)
        elif value is not None:
            found[key] = value
    return found


def _before(recipe: Recipe, stage: str) -> int:
    """The epochs of the trainings before this one."""
    epochs = training_epochs(recipe.train.epochs, recipe.finetune.epochs, recipe.slim.steps, recipe.baseline)
    return sum(list(epochs.values())[: list(epochs).index(stage)])


def _hyperparameters(tracker: Any, recipe: Recipe) -> None:
    # Not the tracker's store_init_configuration: it puts them into a run of their own, beside which no metric stands.
    from torch.utils.tensorboard.summary import hparams

    _, started, _ = hparams(flat(recipe.model_dump(mode="json")), {})
    tracker.tracker.file_writer.add_summary(started)
    tracker.tracker.flush()


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, folder / FOLDER) from error
