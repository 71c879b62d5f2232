"""``prunekit groups``: list the groups of a recipe's or a run's model."""

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
from torch import nn

from prunekit.commands.import_model import derived_recipe
from prunekit.config import recipe as recipes
from prunekit.config.overrides import shipped_recipes
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import build_dense, choose_model, input_shape, load_model, read_recipe
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.reporting.number_format import short_number
from prunekit.runs.folders import is_run_folder
from prunekit.runs.run_dir import RunDir
from prunekit.utils.text import did_you_mean
from prunekit.weights import locate

OPERATORS = {"serial": " → ", "parallel": " | "}
MAX_DEPTH = 4  # of nested sums and products
MAX_GATES = 4  # written out in one row or sum


@dataclass
class ModelGroups:
    """The groups of a model."""

    source: str  # the recipe or the run folder
    model: str  # "baseline", "dense", "slim" or "finetuned"; for a recipe "dense", untrained
    shape: tuple[int, int, int]  # of one input, (C, H, W)
    params: int  # of the whole model
    macs: int
    groups: list[Group]  # in the order of computation
    # Id of a prunable group with gates → number of channels whose effective gate is above ``threshold``; None for a
    # recipe, whose gates are untrained.
    alive: dict[str, int] | None
    threshold: float  # the recipe's ``slim.threshold``


def dump(inspected: ModelGroups) -> str:
    """The groups as JSON: each as in ``plan.Group``, with ``alive`` (null where it does not apply)."""
    alive = inspected.alive or {}
    content = {
        "source": inspected.source,
        "model": inspected.model,
        "input": list(inspected.shape),
        "params": inspected.params,
        "macs": inspected.macs,
        "threshold": None if inspected.alive is None else inspected.threshold,
        "groups": [{**group.model_dump(mode="json"), "alive": alive.get(group.id)} for group in inspected.groups],
    }
    return json.dumps(content, indent=2)


def inspect_groups(source: str, overrides: Sequence[str] = (), model: str | None = None) -> ModelGroups:
    """Find the groups of a model. No data is read.

    Args:
        source: a run folder, a recipe file or the name of a shipped recipe.
        overrides: ``key=value`` each, such as ``data.size=64`` or ``slim.threshold=5e-2``.
        model: "baseline", "dense", "slim" or "finetuned" of a run; None for the run's newest.

    Raises:
        RecipeError: there is no such recipe, run or model.
        PlanError: the model fails on an input of the recipe's size.
    """
    folder = locate(Path(source).expanduser())
    is_run = is_run_folder(folder)
    if is_run:
        recipe = derived_recipe(folder, list(overrides)) if overrides else None
        run = RunDir.open(folder)
        name = choose_model(run, model)
        recipe = recipe or read_recipe(run)
        network: nn.Module = load_model(run, name, recipe)
    else:
        if model is not None:
            raise RecipeError(f"--model {model}: {source} is not a run folder; a recipe has only the dense model")
        check_source(source)
        recipe, name = recipes.load(source, overrides), "dense"
        network = build_dense(recipe)
    shape, threshold = input_shape(recipe), recipe.slim.threshold
    groups = find_groups(network, torch.zeros(1, *shape))
    alive = {g.id: int((gate_scores(network, g) > threshold).sum()) for g in groups if g.reason is None and g.gates}
    cost = total(count_modules(network, shape)[0])
    return ModelGroups(source, name, shape, cost["params"], cost["macs"], groups, alive if is_run else None, threshold)


def check_source(source: str) -> None:
    """Raise RecipeError with a hint if there is no such recipe."""
    path = Path(source).expanduser()
    if os.sep in source and not path.exists() and path.parent.is_dir():
        hint = did_you_mean(path) or "; give a recipe or a run folder"
        raise RecipeError(f"{source}: no such recipe or run folder{hint}")
    if path.is_dir() and path.name not in shipped_recipes() and not (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{source} is neither a recipe nor a run folder (it has no recipe.yaml); give one that prunekit run made"
        )


def format_gates(group: Group) -> str:
    """How the gates of a group combine: "layer1.(bn1 → bn2)" for a product, "a | b" for a sum; shortened if long."""

    def write(tree: Any, depth: int) -> str:
        if isinstance(tree, int):
            gate = group.gates[tree]
            return gate.norm if gate.slice[0] == 0 else f"{gate.norm}@{gate.slice[0]}"
        kind, parts = next(iter(tree.items()))
        if depth > MAX_DEPTH:
            return "…"
        terms = [write(part, depth + 1) for part in parts]
        prefix, suffix = "", ""
        if all(isinstance(part, int) for part in parts):
            prefix, terms, suffix = _factor_out(terms)
        if len(terms) > MAX_GATES:
            terms = [*terms[:2], f"… {len(terms) - 3} more …", terms[-1]]
        text = OPERATORS[kind].join(terms)
        return f"{prefix}({text}){suffix}" if depth or prefix or suffix else text

    return "no gate" if group.combine is None else write(group.combine, 0)


def _factor_out(names: list[str]) -> tuple[str, list[str], str]:
    """The common prefix of dotted names, their different parts (never empty), and their common suffix."""
    split = [name.split(".") for name in names]
    shortest = min(map(len, split)) - 1
    start = min(_common_length(split), shortest)
    end = min(_common_length([parts[::-1] for parts in split]), shortest - start)
    different = [".".join(parts[start : len(parts) - end]) for parts in split]
    first = split[0]
    prefix = "".join(f"{part}." for part in first[:start])
    return prefix, different, "".join(f".{part}" for part in first[len(first) - end :])


def _common_length(lists: list[list[str]]) -> int:
    """The number of items at the start that are equal in all lists."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))


def show_groups(inspected: ModelGroups, console: Console) -> None:
    """Print a table of the groups, and totals."""
    size = "×".join(map(str, inspected.shape))
    title = f"{inspected.source}, {inspected.model} model, input {size}: {inspected.params:,} params"
    console.print(f"{title}, {inspected.macs:,} MACs", markup=False, highlight=False)
    titles = ["channels", *(["alive"] if inspected.alive is not None else []), "params each", "MACs each"]
    rows = [_row(group, inspected.alive) for group in inspected.groups]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    left = max(20, console.width - sum(width + 2 for width in widths))

    def align(cells: Sequence[str]) -> str:
        return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [Text(f"{'group and its gates':{left}.{left}}{align(titles)}", "bold")]
    for group, row in zip(inspected.groups, rows, strict=True):
        # A name that is too long for its column is folded; the numbers are in its last line.
        *folded, name = [group.id[start : start + left] for start in range(0, len(group.id), left)]
        lines += [*map(Text, folded), Text(f"{name:{left}}{align(row)}")]
        detail = format_gates(group) if group.reason is None else f"cannot be pruned: {group.reason}"
        wrapped = textwrap.wrap(
            detail, console.width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
        lines += [Text(part, "dim" if group.reason is None else "yellow") for part in wrapped]
    console.print(Text("\n").join(lines), highlight=False)
    console.print("\n".join(_totals(inspected)), markup=False, highlight=False)


def _row(group: Group, alive: dict[str, int] | None) -> list[str]:
    count = [] if alive is None else [f"{alive[group.id]:,}" if group.id in alive else "–"]
    return [f"{group.channels:,}", *count, short_number(group.params), short_number(group.macs)]


def _totals(inspected: ModelGroups) -> list[str]:
    fixed = [group for group in inspected.groups if group.reason is not None]
    prunable = [group for group in inspected.groups if group.reason is None]
    count = len(inspected.groups)
    lines = [f"{len(prunable)} of {count} groups can be pruned, {_channels(prunable)}"]
    if inspected.alive:
        alive, gated = sum(inspected.alive.values()), sum(group.channels for group in prunable if group.gates)
        of = "them" if len(inspected.alive) == len(prunable) else f"the {gated:,} with gates"
        lines[0] += f", {alive:,} of {of} alive (effective gate above {inspected.threshold:g})"
    if fixed:
        lines.append(f"{len(fixed)} of {count} groups cannot be pruned, {_channels(fixed)}:")
        reasons = Counter(group.reason for group in fixed)
        lines += [f"  {number} × {reason}" for reason, number in reasons.most_common()]
    return lines


def _channels(groups: Sequence[Group]) -> str:
    number = sum(group.channels for group in groups)
    return f"{number:,} channel{'' if number == 1 else 's'}"
