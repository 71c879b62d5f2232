"""The runs of a sweep as a tree: what several trials compute alike is run once, and copied.

A run that stops before a stage (``prunekit run --until``) may continue with other values of the keys that only this
stage and the later ones read. Trials that differ in such keys alone therefore begin with copies of one run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.config.schema import Recipe
from prunekit.runs.recipe_changes import dependencies
from prunekit.runs.stage_order import GRADUAL_PRUNING
from prunekit.utils.io import sha256

# Where a shared run may stop. Fine-tuning is the last stage that takes long.
_STOPS = (GRADUAL_PRUNING, "extract", "finetune", "evaluate")


@dataclass(frozen=True)
class Task:
    """A run of the sweep.

    Attributes:
        folder: relative to that of the sweep.
        overrides: of the recipe.
        until: the stage before which it stops; None for a trial.
        parent: folder of the run that it continues a copy of; None: it starts anew.
        trials: numbers of the trials that need it.
        digest: of its recipe.
    """

    folder: str
    overrides: tuple[str, ...]
    until: str | None
    parent: str | None
    trials: tuple[int, ...]
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("folder", "overrides", "until", "parent")}


def plan_tasks(names: Sequence[str], recipes: Sequence[Recipe], overrides: Sequence[Sequence[str]]) -> list[Task]:
    """Return the shared runs and the trials; each comes after its parent.

    Args:
        names: of the trials.
        recipes: of the trials.
        overrides: of the trials.
    """
    shared: dict[tuple[int, ...], tuple[str, str]] = {}
    for stop in _STOPS:
        members: dict[str, list[int]] = {}
        for index, recipe in enumerate(recipes):
            if stop != GRADUAL_PRUNING or recipe.train.gradual_pruning.start:
                members.setdefault(_digest(recipe, stop), []).append(index)
        # The same trials may share more than this: the last stop counts.
        shared |= {tuple(trials): (stop, digest) for digest, trials in members.items() if len(trials) > 1}
    tasks: list[Task] = []
    for trials, (stop, digest) in sorted(shared.items(), key=lambda item: (-len(item[0]), item[0])):
        folder = f"shared/{digest[:12]}"
        tasks.append(Task(folder, tuple(overrides[trials[0]]), stop, _parent(tasks, trials), trials))
    trial_tasks = [
        Task(name, tuple(overrides[i]), None, _parent(tasks, (i,)), (i,), sha256(recipes[i].dump().encode()))
        for i, name in enumerate(names)
    ]
    return tasks + trial_tasks


def _parent(tasks: Sequence[Task], trials: Sequence[int]) -> str | None:
    """The folder of the smallest shared run that contains these trials."""
    containing = [task for task in tasks if set(trials) <= set(task.trials)]
    return min(containing, key=lambda task: len(task.trials)).folder if containing else None


def _digest(recipe: Recipe, stop: str) -> str:
    known = json.dumps([stop, dependencies(recipe, stop)], sort_keys=True)
    return sha256(known.encode())
