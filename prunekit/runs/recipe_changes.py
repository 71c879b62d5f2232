"""Which keys of a recipe may change when a run resumes: those that no finished or started stage depends on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunekit.config import yaml
from prunekit.config.schema import PATHS, Recipe, real_path
from prunekit.config.yaml import format_path
from prunekit.runs.artifacts import RECIPE
from prunekit.runs.stage_order import GRADUAL_PRUNING, STAGES
from prunekit.utils.text import join_names

# They change no result.
_ALWAYS = {
    *((stage, key) for stage in ("train", "finetune") for key in ("on_nonfinite", "validate_every")),
    ("data", "cache"),
}
_DATA_PATHS = {("data", "root"), ("data", "val_root")}
_MAX_DIFF_LINES = 12
_OTHERWISE = ", or --overwrite, or another --out DIR"


def refuse_change(
    old: str,
    new: str,
    folder: Path,
    is_started: Callable[[str], bool],
    is_same_data: Callable[[], bool] | None = None,
) -> str | None:
    """Return why a run of one resolved recipe, as YAML, cannot resume with another; None if it can.

    Args:
        old: recipe of the run.
        new: recipe to resume with.
        folder: the run folder.
        is_started: whether results of a stage, or of "gradual_pruning", are kept.
        is_same_data: whether the images and targets are the same; None if unknown.
    """
    if old == new:
        return None
    problem = f"{folder} was started with another recipe"
    try:
        recipes = [Recipe.model_validate(yaml.parse(text).value) for text in (old, new)]
    except ValueError:
        return f"{problem}; use that one{_OTHERWISE}:\n{_diff(old, new)}"
    stages = {key: first_stage(key, recipes) for key in _changed_keys(recipes)}
    started = {key: stage for key, stage in stages.items() if stage is None or is_started(stage)}
    moved = started.keys() & _DATA_PATHS
    if moved and is_same_data is not None and started.keys() <= _DATA_PATHS:
        if is_same_data():
            return None
        names = join_names([format_path(key) for key in sorted(moved)])
        problem = f"{folder} was started with other data: images or targets in {names} differ; use the same data"
        return f"{problem}{_OTHERWISE}:\n{_diff(old, new)}"
    if not started:
        return None
    keys = join_names([format_path(key) for key in started])
    problem += f": {keys} cannot change now; use the old value"
    problem += "" if len(started) == 1 else "s"
    if None not in started.values():
        first = min((STAGES[0] if s == GRADUAL_PRUNING else s for s in started.values()), key=STAGES.index)
        if first != STAGES[0]:
            problem += f", or --from {first} to repeat that stage and the later ones"
        if ("train", "epochs") in started and recipes[1].train.epochs > recipes[0].train.epochs:
            problem += f", or train the model of the finished run further in a new one: init={folder} --out DIR"
    return f"{problem}{_OTHERWISE}:\n{_diff(old, new)}"


def first_stage(key: yaml.Path, recipes: list[Recipe]) -> str | None:
    """Return the first stage whose result depends on a key in one of the recipes; None: what the run starts from.

    "gradual_pruning" is the part of the training that begins with the choice of channels.
    """
    section = key[0]
    gradual = any(recipe.train.gradual_pruning.start is not None for recipe in recipes)
    if key == ("slim", "recalibrate"):
        return "finetune"
    if section == "finetune":
        return "slim" if any(recipe.slim.steps > 1 for recipe in recipes) else "finetune"
    if section in ("slim", "target", "latency"):
        return GRADUAL_PRUNING if gradual else "extract"
    if key[:2] == ("train", "gradual_pruning") and key[2:] != ("start",) and gradual:
        return GRADUAL_PRUNING
    if section in ("train", "decay", "baseline", "log"):
        return "train"
    return section if section in STAGES else None


def dependencies(recipe: Recipe, stop: str) -> dict[str, Any]:
    """Return the keys, with values, on which the results of a run depend that stops before this stage.

    Two runs with the same ones may continue as one another.
    """
    order = {None: 0, STAGES[0]: 1, GRADUAL_PRUNING: 2} | {stage: 2 + n for n, stage in enumerate(STAGES[1:], 1)}
    found = {}
    for key, value in _leaves(recipe.model_dump(mode="json")):
        # The metrics of each epoch count the gates above the threshold.
        stage = STAGES[0] if key == ("slim", "threshold") else first_stage(key, [recipe])
        if key != ("data", "cache") and order[stage] < order[stop]:
            found[format_path(key)] = value
    return found


def _changed_keys(recipes: list[Recipe]) -> list[yaml.Path]:
    old, new = (dict(_leaves(recipe.model_dump())) for recipe in recipes)
    return [
        key
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and key not in _ALWAYS
        # Older versions recorded relative paths.
        and not (key in PATHS and old[key] and new[key] and real_path(old[key]) == real_path(new[key]))
    ]


def _leaves(value: Any, path: yaml.Path = ()) -> Iterator[tuple[yaml.Path, Any]]:
    if not (isinstance(value, dict) and value):
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(item, (*path, key))


def _diff(old: str, new: str) -> str:
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), RECIPE, "now", lineterm="", n=0))
    return "\n".join([*lines[:_MAX_DIFF_LINES], *(["…"] if len(lines) > _MAX_DIFF_LINES else [])])
