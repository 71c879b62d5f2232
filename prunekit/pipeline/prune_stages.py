"""The stages extract and slim of a run: what is cut, by a threshold or to a budget, at once or in rounds.

Both choose in the same way, so that the second reproduces the plan of the first; it does not read it, since plan.json
becomes the plan that held, and a stage that is done again must begin as it began before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import Recipe
from prunekit.data.datasets import normalize
from prunekit.flops import count_modules, layers_table, total
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import (
    SHRUNK,
    initial_model,
    initial_plan,
    input_shape,
    load_model,
    save_model,
    trained_plan,
)
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Builder, Group, Plan, digest
from prunekit.pruning.selection.budget import Budget, BudgetSearch
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.selection.extract import plan_from_selection
from prunekit.pruning.sparsity.decay import Decay, NoDecay
from prunekit.pruning.sparsity.lambda_controller import LambdaController
from prunekit.pruning.sparsity.progressive import ProgressivePruning
from prunekit.pruning.surgery.compose import compose
from prunekit.pruning.surgery.equivalence import EquivalenceReport, output_difference
from prunekit.pruning.surgery.slim import slim
from prunekit.runs.run_dir import RunDir
from prunekit.training.trainer import bind_options, seeded_generator

LOSS_BATCHES = 8  # of training data, for criteria that look at the loss


def extract_stage(work: RunContext, run: RunDir) -> None:
    dense = load_model(run, "dense", work.recipe)
    groups = find_groups(dense, work.example())
    cut = _Cut(work, dense, groups, _goals(work, run, dense, groups)[0])
    plan = cut.plan()
    work.reporter.info(f"extract: {cut.outcome()}")
    _say(work, "extract", plan.notes)
    _write_plan(work, run, groups, plan)


def slim_stage(work: RunContext, run: RunDir) -> None:
    recipe, example = work.recipe, work.example()
    dense = load_model(run, "dense", recipe)
    model, groups, so_far = dense, find_groups(dense, example), trained_plan(run)
    first = initial_model(run, recipe)
    of = sum(group.channels for group in find_groups(first, example) if group.reason is None)
    goals = _goals(work, run, dense, groups)
    rounds: list[dict[str, Any]] = []
    said: list[str] = []
    for number, goal in enumerate(goals, start=1):
        cut = _Cut(work, model, groups, goal)
        said = said or cut.plan().notes  # by the stage before
        small, equivalence = cut.slim(example)
        held = equivalence.plan
        _say(work, "slim", [note for note in held.notes if note not in said])
        said = [*said, *held.notes]
        kept = sum(len(held.kept(group)) for group in groups if group.reason is None)
        so_far = _write_plan(work, run, groups, held, so_far)
        counts, _ = count_modules(small, work.shape)
        sizes = total(counts)
        rounds.append({"params": sizes["params"], "macs": sizes["macs"], **equivalence.to_json()})
        model, groups = small, find_groups(small, example)
        if number < len(goals):
            work.reporter.info(f"slim: step {number} of {len(goals)}: {sizes[goal.measure]:,} {goal.measure}")
            # Its training state stays, so a stage that is done again finds the model as it was.
            work.train(run, f"step{number}", model, groups, NoDecay(model, groups))
    save_model(run, "slim", model)
    work.measure(run, "slim", model)
    steps = {"steps": rounds} if len(rounds) > 1 else {}
    run.update_summary("equivalence", {**equivalence.to_json(), **steps})
    largest, mean = output_difference(dense, model, [example])
    run.update_summary("drift", {"max_abs_diff": largest, "mean_abs_diff": mean})
    summary = run.read_json("summary.json")
    ratios = {f"{key}_ratio": summary["slim"][key] / summary["dense"][key] for key in ("params", "macs")}
    run.update_summary("kept", {"channels": kept, "of": of, **ratios})
    run.write_json("layers.json", layers_table(first, model, work.shape))
    work.reporter.info(_outcome(equivalence, kept, of, largest))


def steering(work: RunContext, model: nn.Module, groups: Sequence[Group], decay: Decay) -> LambdaController | None:
    """What steers λ while this model trains towards the recipe's budget; None where there is no budget or no λ.

    Raises:
        PlanError: the budget cannot be met.
    """
    return _steering(work, model, groups, decay, _budget(work, model, groups))


def shrinking(work: RunContext, model: nn.Module, groups: Sequence[Group]) -> ProgressivePruning | None:
    """What cuts dead channels while this model trains; None where the recipe does not want it.

    Raises:
        PlanError: the budget cannot be met.
    """
    recipe = work.recipe
    if recipe.train.prune_every is None:
        return None
    goal = _budget(work, model, groups)

    def make_decay(left: nn.Module, of: list[Group]) -> tuple[Decay, LambdaController | None]:
        decay = work.decay(left, of)
        return decay, _steering(work, left, of, decay, goal)

    return ProgressivePruning(
        model,
        groups,
        work.example(),
        every=recipe.train.prune_every,
        threshold=recipe.slim.threshold,
        make_decay=make_decay,
        budget=goal,
        constants=recipe.slim.constants,
        **{key: value for key, value in _limits(recipe).items() if key != "scope"},
    )


def keep_cuts(work: RunContext, run: RunDir, shrinking: ProgressivePruning) -> None:
    """Write down what a training has cut: its plan, of the builder's model, and the record of each cut."""
    plan, first = shrinking.plan, initial_plan(run)
    if first is not None:
        plan = compose(*work.builder(), first, shrinking.initial_groups, plan)
    run.write_json(SHRUNK, plan.to_json())
    run.update_summary("shrunk", shrinking.records)


def _steering(
    work: RunContext, model: nn.Module, groups: Sequence[Group], decay: Decay, budget: Budget | None
) -> LambdaController | None:
    if budget is None or work.recipe.slim.importance.name != "gate" or not decay.weight > 0:
        return None
    fitter = _fitter(work, model, groups)
    return LambdaController(
        model,
        groups,
        fitter.size_model,
        budget.measure,
        budget.goal,
        threshold=work.recipe.slim.threshold,
        weight=decay.weight,
        limits={group.id: int(n) for group, n in zip(fitter.selector.groups, fitter.selector.limits, strict=True)},
    )


def _budget(work: RunContext, model: nn.Module, groups: Sequence[Group]) -> Budget | None:
    """The recipe's budget, as an absolute number, for a run whose training starts with this model; None without."""
    asked = _asked(work.recipe)
    return _fitter(work, model, groups).budget(**asked) if asked else None


def _fitter(work: RunContext, model: nn.Module, groups: Sequence[Group]) -> BudgetSearch:
    # The gates, whatever the criterion: what the limits allow does not depend on scores.
    return BudgetSearch(model, groups, work.shape, None, **_limits(work.recipe))


class _Cut:
    """What one round cuts from one model."""

    def __init__(self, work: RunContext, model: nn.Module, groups: Sequence[Group], goal: Budget | None):
        self.work, self.model, self.groups, self.goal = work, model, groups, goal
        criterion = bind_options(registry.importances, work.recipe.slim.importance)
        self.fitter = BudgetSearch(
            model, groups, work.shape, criterion(model, groups, _losses(work)), **_limits(work.recipe)
        )
        threshold = work.recipe.slim.threshold
        self.choice = self.fitter.selector.select(threshold=threshold) if goal is None else self.fitter.select(goal)

    def plan(self) -> Plan:
        return plan_from_selection(self.model, self.groups, self.choice)

    def slim(self, example: Tensor) -> tuple[nn.Module, EquivalenceReport]:
        constants = self.work.recipe.slim.constants
        if self.goal is not None:
            return self.fitter.slim(self.goal, example, constants)[:2]
        return slim(self.model, self.plan(), example, groups=self.groups, constants=constants)

    def outcome(self) -> str:
        of = sum(group.channels for group in self.groups if group.reason is None)
        size = self.fitter.size_model.size_without(self.choice.dead)
        if self.goal is None:
            return f"{self.choice.pruned} of {of} channels are dead at threshold {self.work.recipe.slim.threshold:g}"
        return (
            f"{self.choice.pruned} of {of} channels are cut for {self.goal.size(size):,} {self.goal.measure}, "
            f"budget {self.goal.goal:,}"
        )


def _asked(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.target.model_dump().items() if value is not None}


def _limits(recipe: Recipe) -> dict[str, Any]:
    section = recipe.slim
    return {
        "scope": section.scope,
        "min_channels": section.min_channels,
        "round_to": section.round_to,
        "ignored_layers": section.ignored_layers,
    }


def _goals(work: RunContext, run: RunDir, dense: nn.Module, groups: Sequence[Group]) -> list[Budget | None]:
    """The budget of each round: from the dense model's size to the last in equal ratios; [None] where there is none."""
    recipe = work.recipe
    if not _asked(recipe):
        return [None]
    # Of what the training began with; where it shrank, the first round goes on from what is left of that.
    first = initial_model(run, recipe)
    last = _budget(work, first, find_groups(first, work.example()))
    full, steps = last.size(SizeModel(dense, groups, work.shape).dense), recipe.slim.steps
    return [replace(last, goal=round(full * (last.goal / full) ** (k / steps))) for k in range(1, steps)] + [last]


def _losses(work: RunContext) -> Any:
    """The loss of a model, that which it was trained by, on each of a few batches of training data, the same ones every
    time."""
    loss = bind_options(registry.losses, work.recipe.train.loss)(work.task)
    train, size = work.tensors("train"), work.recipe.train.batch_size
    order = torch.randperm(len(train), generator=seeded_generator(work.recipe.seed, "criterion", 0))

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for rows in order.split(size)[:LOSS_BATCHES]:
            images = normalize(train.images[rows])
            yield loss(model(images), train.targets[rows])

    return losses


def _write_plan(work: RunContext, run: RunDir, groups: Sequence[Group], plan: Plan, first: Plan | None = None) -> Plan:
    """Write a plan, composed with what was cut before; the whole."""
    recipe = work.recipe
    first = trained_plan(run) if first is None else first
    notes = plan.notes
    if first is not None:
        plan = compose(*work.builder(), first, groups, plan)
        plan.notes = notes
    backbone = recipe.backbone
    plan.builder = Builder(name=backbone.name, options=backbone.options, file=backbone.file)
    plan.input = list(input_shape(recipe))
    plan.recipe_hash = digest(recipe.model_dump(mode="json"))
    plan.dense_hash = run.checksum("dense/model.safetensors")[:16]
    run.write_json("plan.json", plan.to_json())
    return plan


def _say(work: RunContext, stage: str, notes: Sequence[str]) -> None:
    for note in notes:
        work.reporter.info(f"{stage}: {note}")


def _outcome(equivalence: EquivalenceReport, kept: int, of: int, drift: float) -> str:
    given = f", {equivalence.given_back} channels given back" if equivalence.given_back else ""
    carriers = f", {equivalence.carriers} as carriers of constants" if equivalence.carriers else ""
    verdict = "equivalence check passed" if equivalence.passed else f"equivalence check failed ({equivalence.reason})"
    return (
        f"slim: {kept} of {of} channels kept{carriers}{given}; {verdict}: largest difference "
        f"{equivalence.max_abs_diff:.1e} (tolerance {equivalence.tolerance:.0e}); drift {drift:.3g}"
    )
