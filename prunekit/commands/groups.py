"""The groups of a recipe's or a run's model, to look at: what the command ``groups`` shows."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from prunekit.commands.import_model import derived_recipe
from prunekit.config import recipe as recipes
from prunekit.config.registry import closest_match
from prunekit.config.sources import shipped_recipes
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import MODELS, build_dense, input_shape, load_model, newest_model, read_recipe
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.reporting.number_format import short_number
from prunekit.runs.run_dir import RunDir, is_run_folder

SIGNS = {"serial": " → ", "parallel": " | "}
SHOWN = 4  # gates of one row or sum that are written out


@dataclass
class Inspection:
    """A model's groups.

    Attributes:
        source: the recipe or the run folder.
        model: "baseline", "dense", "slim" or "finetuned"; a recipe's is "dense", untrained.
        shape: of one input, (C, H, W).
        params, macs: of the whole model.
        groups: in the order of computation.
        living: of each group that can be cut, the channels whose effective gate is above ``threshold``; None for a
            recipe, whose gates have learned nothing.
        threshold: the recipe's ``slim.threshold``.
    """

    source: str
    model: str
    shape: tuple[int, int, int]
    params: int
    macs: int
    groups: list[Group]
    living: dict[str, int] | None
    threshold: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; each group as in ``plan.Group``, with ``living`` (null where it does not apply)."""
        living = self.living or {}
        return {
            "source": self.source,
            "model": self.model,
            "input": list(self.shape),
            "params": self.params,
            "macs": self.macs,
            "threshold": None if self.living is None else self.threshold,
            "groups": [{**group.model_dump(mode="json"), "living": living.get(group.id)} for group in self.groups],
        }


def inspect_groups(source: str, overrides: Sequence[str] = (), model: str | None = None) -> Inspection:
    """Find the groups of a model; no data is read.

    Args:
        source: a run folder, a recipe file or the name of a shipped recipe.
        overrides: ``key=value`` each, such as ``data.size=64`` or ``slim.threshold=5e-2``.
        model: "baseline", "dense", "slim" or "finetuned", of a run; None for the last that the run has.

    Raises:
        RecipeError: there is no such recipe, run or model.
        PlanError: the model fails on an input of the recipe's size.
    """
    folder = Path(source).expanduser()
    if not is_run_folder(folder):
        if model is not None:
            raise RecipeError(f"--model {model}: {source} is no run folder; a recipe has its builder's model only")
        found = recipes.load(_recipe(source), overrides)
        return _inspect(source, "dense", build_dense(found), found, trained=False)
    found = derived_recipe(folder, list(overrides)) if overrides else None
    run = RunDir.open(folder)
    name = _model(run, model)
    found = found or read_recipe(run)
    return _inspect(source, name, load_model(run, name, found), found, trained=True)


def _inspect(source: str, name: str, network: torch.nn.Module, recipe: recipes.Recipe, *, trained: bool) -> Inspection:
    shape, threshold = input_shape(recipe), recipe.slim.threshold
    groups = find_groups(network, torch.zeros(1, *shape))
    living = {g.id: int((gate_scores(network, g) > threshold).sum()) for g in groups if g.reason is None}
    sums = total(count_modules(network, shape)[0])
    return Inspection(source, name, shape, sums["params"], sums["macs"], groups, living if trained else None, threshold)


def _recipe(source: str) -> str:
    """The recipe of this name; raises RecipeError with what stands where it was looked for."""
    path = Path(source).expanduser()
    if os.sep in source and not path.exists() and path.parent.is_dir():
        near = closest_match(path.name, sorted(entry.name for entry in path.parent.iterdir()))
        hint = f"; did you mean {path.parent / near}?" if near else "; give a recipe or a run folder"
        raise RecipeError(f"{source}: no such recipe or run folder{hint}")
    if path.is_dir() and path.name not in shipped_recipes() and not (path / "recipe.yaml").is_file():
        raise RecipeError(f"{source} is neither a recipe nor a run folder; give one that prunekit run has made")
    return source


def _model(run: RunDir, wanted: str | None) -> str:
    newest = newest_model(run)
    held = [name for name in MODELS if run.has(f"{name}/model.safetensors")]
    if wanted is None or wanted in held:
        return wanted or newest
    near = closest_match(wanted, held)
    hint = f", did you mean {near!r}?" if near else ";"
    raise RecipeError(f"--model {wanted}: {run.path} has no such model{hint} it has {', '.join(held)}")


def combination(group: Group) -> str:
    """How the group's gates combine: "bn1 → bn2" in a row, "a | b" side by side; long ones are shortened.

    What the names have in common stands outside of brackets: "layer1.(bn1 → bn2)".
    """

    def write(tree: Any, nested: bool) -> str:
        if isinstance(tree, int):
            gate = group.gates[tree]
            return gate.norm if gate.slice[0] == 0 else f"{gate.norm}@{gate.slice[0]}"
        kind, parts = next(iter(tree.items()))
        words = [write(part, True) for part in parts]
        head, tail = "", ""
        if all(isinstance(part, int) for part in parts):
            head, words, tail = _factored(words)
        if len(words) > SHOWN:
            words = [*words[:2], f"… {len(words) - 3} more …", words[-1]]
        text = SIGNS[kind].join(words)
        return f"{head}({text}){tail}" if nested or head or tail else text

    return "" if group.combine is None else write(group.combine, False)


def _factored(names: list[str]) -> tuple[str, list[str], str]:
    """What dotted names have in common at their begin, what differs, what they have in common at their end."""
    split = [name.split(".") for name in names]
    # Something must be left of each.
    most = min(map(len, split)) - 1
    head = min(_shared(split), most)
    tail = min(_shared([parts[::-1] for parts in split]), most - head)
    middle = [".".join(parts[head : len(parts) - tail]) for parts in split]
    first = split[0]
    before = "".join(f"{part}." for part in first[:head])
    return before, middle, "".join(f".{part}" for part in first[len(first) - tail :])


def _shared(lists: list[list[str]]) -> int:
    """How many items all of them begin with."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))


def show_groups(inspection: Inspection, console: Console) -> None:
    """Print the groups as a table and what they add up to."""
    it = inspection
    size = "×".join(map(str, it.shape))
    _say(console, f"{it.source}, {it.model} model, input {size}: {it.params:,} params, {it.macs:,} MACs")
    titles = ["channels", *(["living"] if it.living is not None else []), "params each", "MACs each"]
    rows = [_row(group, it.living) for group in it.groups]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    left = max(20, console.width - sum(width + 2 for width in widths))

    def numbers(words: Sequence[str]) -> str:
        return "".join(f"  {word:>{width}}" for word, width in zip(words, widths, strict=True))

    lines = [Text(f"{'group, and its gates':{left}.{left}}{numbers(titles)}", "bold")]
    for group, row in zip(it.groups, rows, strict=True):
        # A name that is too long for its column stands above its figures.
        *above, name = [group.id[at : at + left] for at in range(0, len(group.id), left)]
        lines += [*map(Text, above), Text(f"{name:{left}}{numbers(row)}")]
        detail = combination(group) if group.reason is None else f"cannot be cut: {group.reason}"
        wrapped = textwrap.wrap(
            detail, console.width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
        lines += [Text(part, "dim" if group.reason is None else "yellow") for part in wrapped]
    console.print(Text("\n").join(lines), highlight=False)
    for line in _totals(it):
        _say(console, line)


def _row(group: Group, living: dict[str, int] | None) -> list[str]:
    alive = [] if living is None else [f"{living[group.id]:,}" if group.id in living else "–"]
    return [f"{group.channels:,}", *alive, short_number(group.params), short_number(group.macs)]


def _totals(it: Inspection) -> list[str]:
    fixed = [group for group in it.groups if group.reason is not None]
    free = [group for group in it.groups if group.reason is None]
    lines = [f"{len(free)} of {len(it.groups)} groups can be cut, {_channels(free)}"]
    if it.living is not None:
        living = sum(it.living.values())
        lines[0] += f", of which {living:,} live (effective gate above {it.threshold:g})"
    if fixed:
        lines.append(f"{len(fixed)} of {len(it.groups)} groups cannot be cut, {_channels(fixed)}:")
        reasons = Counter(group.reason for group in fixed)
        lines += [f"  {times} × {reason}" for reason, times in reasons.most_common()]
    return lines


def _channels(groups: Sequence[Group]) -> str:
    number = sum(group.channels for group in groups)
    return f"{number:,} channel{'' if number == 1 else 's'}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def dump(inspection: Inspection) -> str:
    """The inspection as JSON."""
    return json.dumps(inspection.to_json(), indent=2)
