"""Commands that train, run by several processes: process 0 runs the command, the others join in its trainings.

The workers compute the same decisions from the same bits, and keep what they write in memory.
"""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from prunekit.config.schema import Recipe
from prunekit.errors import PlanError, TrainingError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.stages import STAGE_FUNCTIONS
from prunekit.runs.worker_run_dir import WorkerRunDir
from prunekit.utils import distributed
from prunekit.utils.progress import Reporter


def main_process_command(command: Callable[..., Path]) -> Callable[..., Path]:
    """Decorate a command with arguments ``recipe`` and ``out``: process 0 runs it, the others follow its stages."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Path:
        if distributed.init() == 0:
            with distributed.main_process_scope():
                return command(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        _follow(arguments["recipe"], Path(arguments["out"]))
        return arguments["out"]

    return run


def stage_trains(stage: str, recipe: Recipe) -> bool:
    """Return whether a stage of this recipe trains a model."""
    return stage in ("train", "finetune") or (stage == "slim" and recipe.slim.steps > 1)


def _follow(recipe: Recipe, out: Path) -> None:
    context = RunContext(recipe, Reporter(Console(file=io.StringIO())))
    while (stage := distributed.receive_command()) is not None:
        try:
            STAGE_FUNCTIONS[stage](context, WorkerRunDir.open(out))
        except distributed.LostProcessError:
            raise
        except (TrainingError, PlanError) as error:
            # Process 0 computes with the same numbers, so it raises the same error and reports it.
            raise SystemExit(error.exit_status) from error
