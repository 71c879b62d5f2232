"""Commands that train, done by several processes: process 0 does them, the others train along.

Of a run's stages the others do those that train, with what they find in the run folder, each for itself: what decides
(λ, what is cut, what is slimmed in rounds) is computed from the same bits everywhere, and held against each other once
an epoch. (Sending every model and every decision was weighed: it takes a form that can be sent, for whatever plugins
bring, where a stage that is done by all takes none.) What they would write stays with them.
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
    """A command with arguments ``recipe`` and ``out``, done by process 0 where there are several."""
    of = inspect.signature(command)

    @functools.wraps(command)
    def done(*args: Any, **kwargs: Any) -> Path:
        if distributed.init() == 0:
            with distributed.main_process_scope():
                return command(*args, **kwargs)
        given = of.bind(*args, **kwargs).arguments
        _follow(given["recipe"], Path(given["out"]))
        return given["out"]

    return done


def stage_trains(stage: str, recipe: Recipe) -> bool:
    """Whether a stage of this recipe trains."""
    return stage in ("train", "finetune") or (stage == "slim" and recipe.slim.steps > 1)


def _follow(recipe: Recipe, out: Path) -> None:
    work = RunContext(recipe, Reporter(Console(file=io.StringIO())))
    while (stage := distributed.receive_command()) is not None:
        try:
            STAGE_FUNCTIONS[stage](work, WorkerRunDir.open(out))
        except distributed.LostProcessError:
            raise
        except (TrainingError, PlanError) as error:
            # Of the same numbers, so process 0 has it too, and says it.
            raise SystemExit(error.exit_status) from error
