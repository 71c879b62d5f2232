"""The stages extract and slim: which channels are removed, by threshold or to meet a budget, at once or in rounds.

Extract writes the plan that the recipe asks for. Slim rebuilds the model by it and writes the plan that passed the
equivalence check. With ``slim.exact`` the two may differ: channels are kept whose removal would change the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.config import registry
from prunekit.config.schema import Recipe
from prunekit.data.datasets import normalize
from prunekit.errors import CheckpointError, PlanError
from prunekit.flops import count_modules, layers_table, total
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import (
    DENSE_WEIGHTS,
    build_dense,
    input_shape,
    load_model,
    read_plan,
    save_model,
)
from prunekit.pipeline.training_setup import build_loss, gates_out_of_reach, train_model
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Builder, Group, Plan, digest
from prunekit.pruning.selection.budget import BudgetSearch
from prunekit.pruning.selection.cost_model import ModelSize
from prunekit.pruning.selection.extract import plan_from_selection
from prunekit.pruning.selection.importance import gate
from prunekit.pruning.selection.selector import Selection
from prunekit.pruning.selection.target import LATENCY_TOLERANCE, Budget, search_measure
from prunekit.pruning.sparsity.dynamic_decay import NoDecay
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.pruning.surgery.compose import compose
from prunekit.pruning.surgery.equivalence import (
    DEAD,
    EquivalenceReport,
    check_equivalence,
    output_difference,
    outputs_of,
)
from prunekit.pruning.surgery.slim import slim
from prunekit.runs.run_dir import RunDir
from prunekit.training.trainer import bind_options, seeded_generator
from prunekit.utils.copying import copy_module
from prunekit.utils.text import plural

LOSS_BATCHES = 8  # of training data, for criteria that evaluate the loss


def extract_stage(context: RunContext, run: RunDir) -> None:
    """Choose the channels to remove from the dense model and write ``extract/plan.json``."""
    recipe = context.recipe
    dense = load_model(run, "dense", recipe)
    groups = context.dense_groups(dense)
    search = channel_search(context, dense, groups)
    of = sum(group.channels for group in groups if group.reason is None)
    goal = _goals(context, dense, groups)[0]
    if goal is None:
        # Gradual pruning has chosen the channels by the threshold already, and they are zero.
        threshold = recipe.slim.threshold if recipe.train.gradual_pruning.start is None else 0.0
        choice = search.selector.select(threshold=threshold)
        outcome = f"{choice.pruned} of {of} channels are dead at threshold {threshold:g}"
    else:
        choice = _select(context, search, goal)
        size = search.size_model.size_without(choice.dead)
        outcome = f"{choice.pruned} of {of} channels are removed for {goal.describe(size)}, budget {goal}"
    plan = plan_from_selection(dense, groups, choice)
    context.reporter.info(f"extract: {outcome}")
    _print_notes(context, "extract", plan.notes)
    # Derived runs have no training of their own, and those with ``init`` began with other gates.
    trained_here = recipe.init is None and run.is_done("train") and run.latest_checkpoint("train") is not None
    untrained = build_dense(recipe) if trained_here and not choice.pruned else None
    if untrained is not None and (reason := gates_out_of_reach(context, untrained, groups)):
        context.reporter.info(f"extract: {reason}")
    _record_origin(context, run, plan)
    run.write_json("extract/plan.json", plan.to_json())


@dataclass(frozen=True)
class _Slimmed:
    model: nn.Module
    plan: Plan  # of the builder's model
    kept: int  # channels, of those that can be removed
    cut: float | None  # the largest gate of a removed channel, where gates were ranked to meet a target
    rounds: list[dict[str, Any]]  # size and equivalence check of each round
    equivalence: EquivalenceReport  # of the last round


def slim_stage(context: RunContext, run: RunDir) -> None:
    """Rebuild the dense model with the channels that are kept, check it, and write it with its figures.

    Where there are several rounds, the model is fine-tuned between them. The first round follows extract's plan.
    """
    dense = load_model(run, "dense", context.recipe)
    try:
        slimmed = _slim_in_rounds(context, run, dense)
    except PlanError as error:
        if DEAD not in str(error):
            raise
        raise PlanError(_dead_network(context, run, dense)) from error
    _write_slim_model(context, run, dense, slimmed)


def _dead_network(context: RunContext, run: RunDir, dense: nn.Module) -> str:
    example, target = context.example().double(), next(iter(context.recipe.target.given), None)
    if check_equivalence(copy_module(dense).double(), copy_module(dense).double(), [example]).reason == DEAD:
        keys = f"target.{target} is too small for this training: raise it" if target else "lower decay.weight"
        return (
            f"{DEAD}, already as trained; {keys}, or set a lower train.lr or more train.epochs, and start again with "
            "--overwrite (--resume would end here again)"
        )
    key = f"target.{target}=LARGER" if target else "slim.threshold=LOWER"
    return (
        f"{DEAD} with so many channels removed; prune the trained model again, without training it: prunekit slim "
        f"{run.path} {key} (--resume would end here again)"
    )


def _slim_in_rounds(context: RunContext, run: RunDir, dense: nn.Module) -> _Slimmed:
    # Only checkpoints and metrics are written, so that a stage that is repeated finds the dense model as it was.
    recipe, example = context.recipe, context.example()
    asked = read_plan(run, "extract")
    if asked is None:
        raise CheckpointError(f"{run.path / 'extract/plan.json'} is missing; make it again with --from extract")
    model, groups, plan = dense, context.dense_groups(dense), read_plan(run, "dense")
    goals = _goals(context, dense, groups)
    rounds: list[dict[str, Any]] = []
    printed = asked.notes
    for number, goal in enumerate(goals, start=1):
        small, equivalence = _slim_once(context, model, groups, goal, asked if number == 1 else None)
        checked = equivalence.plan
        _print_notes(context, "slim", [note for note in checked.notes if note not in printed])
        printed = [*printed, *checked.notes]
        kept = sum(len(checked.kept(group)) for group in groups if group.reason is None)
        cut = None if goal is None else _largest_removed_gate(context, model, groups, checked)
        plan = compose_with_builder(recipe, plan, groups, checked)
        sizes = total(count_modules(small, context.shape)[0])
        rounds.append({"params": sizes["params"], "macs": sizes["macs"], **equivalence.to_json()})
        model = small
        if number < len(goals):
            groups = find_groups(small, example)
            context.reporter.info(
                f"slim: round {number} of {len(goals)}: {goal.describe(ModelSize(sizes['params'], sizes['macs']))}"
            )
            train_model(context, run, f"step{number}", model, groups, NoDecay(model, groups))
    return _Slimmed(model, plan, kept, cut if len(goals) == 1 else None, rounds, equivalence)


def _largest_removed_gate(context: RunContext, model: nn.Module, groups: Sequence[Group], plan: Plan) -> float | None:
    pruning = context.recipe.slim
    if pruning.importance.name != "gate" or pruning.scope != "global" or pruning.cost_power:
        return None
    scores = gate(model, groups)
    removed = [np.delete(scores[group.id], np.asarray(plan.kept(group), int)) for group in groups if group.id in scores]
    largest = max((float(own.max()) for own in removed if own.size), default=np.inf)
    return largest if np.isfinite(largest) else None


def _slim_once(
    context: RunContext, model: nn.Module, groups: Sequence[Group], goal: Budget | None, plan: Plan | None
) -> tuple[nn.Module, EquivalenceReport]:
    """Slim a model by the given plan; without one, or where that misses the budget, by a search for the budget."""
    example, exact = context.example(), context.recipe.slim.exact
    if plan is not None:
        small, equivalence = slim(model, plan, example, groups=groups, exact=exact, sizes=context.check_sizes(model))
        if goal is None:
            return small, equivalence
        assert equivalence.plan is not None
        if goal.accepts(_size_search(context, model, groups).size_of(small, equivalence.plan)):
            return small, equivalence
    return channel_search(context, model, groups).slim(goal, example, exact, context.check_sizes(model))[:2]


def _write_slim_model(context: RunContext, run: RunDir, dense: nn.Module, slimmed: _Slimmed) -> None:
    recipe, model, equivalence = context.recipe, slimmed.model, slimmed.equivalence
    plan = slimmed.plan
    plan.builder = Builder(name=recipe.backbone.name, options=recipe.backbone.options, file=recipe.backbone.file)
    _record_origin(context, run, plan)
    save_model(run, "slim", model, plan)
    context.measure(run, "slim", model)
    steps = {"steps": slimmed.rounds} if len(slimmed.rounds) > 1 else {}
    run.update_summary("equivalence", {**equivalence.to_json(), **steps})
    largest, mean = output_difference(*(outputs_of(each, context.example()) for each in (dense, model)))
    run.update_summary("drift", {"max_abs_diff": largest, "mean_abs_diff": mean})
    of = sum(group.channels for group in context.dense_groups(dense) if group.reason is None)
    summary = run.read_json("summary.json")
    ratios = {f"{key}_ratio": summary["slim"][key] / summary["dense"][key] for key in ("params", "macs")}
    cut = {} if slimmed.cut is None else {"cut": slimmed.cut}
    run.update_summary("kept", {"channels": slimmed.kept, "of": of, **ratios, **cut})
    _record_latency(context, run, dense, plan)
    run.write_json("layers.json", layers_table(dense, model, context.shape))
    given_back = f", {equivalence.given_back} channels given back" if equivalence.given_back else ""
    carriers = f", {equivalence.carriers} as carriers of constants" if equivalence.carriers else ""
    context.reporter.info(
        f"slim: {slimmed.kept} of {of} channels kept{carriers}{given_back}; equivalence check passed: largest "
        f"difference {equivalence.max_abs_diff:.1e} (tolerance {equivalence.tolerance:.0e}); "
        f"{replace(equivalence, drift=largest, drift_mean=mean).describe_drift()}"
    )


def _record_latency(context: RunContext, run: RunDir, dense: nn.Module, plan: Plan) -> None:
    """Measure what a budget of time asked for."""
    target = {key: value for key, value in context.recipe.target.given.items() if key.startswith("latency")}
    if not target:
        return
    ((key, value),) = target.items()
    measured = context.latencies(dense, context.dense_groups(dense)).measure_plan(plan)
    if measured is None:
        return
    run.update_summary("latency", measured)
    reached = measured["ratio"] / value if key == "latency_ratio" else measured["slim_ms"] / value
    context.reporter.info(
        f"slim: {measured['slim_ms']:.3g} ms of {measured['dense_ms']:.3g} ms ({measured['ratio']:.3f}) in "
        f"{measured['runtime']}, {plural(measured['threads'], 'thread')}"
        + (
            f"; target.{key}={value:g} is missed by {abs(reached - 1):.0%}"
            if abs(reached - 1) > LATENCY_TOLERANCE
            else ""
        )
    )


def _record_origin(context: RunContext, run: RunDir, plan: Plan) -> None:
    plan.input = list(context.shape)
    plan.recipe_hash = digest(context.recipe.model_dump(mode="json"))
    plan.dense_hash = run.checksum(DENSE_WEIGHTS)[:16]


def compose_with_builder(recipe: Recipe, first: Plan | None, groups: Sequence[Group], second: Plan) -> Plan:
    """Return, as a plan of the builder's model, a plan of the model (with these groups) that ``first`` makes of it."""
    if first is None:
        return second
    builder = build_dense(recipe)
    plan = compose(builder, find_groups(builder, torch.zeros(1, *input_shape(recipe))), first, groups, second)
    plan.notes = second.notes
    return plan


def gradual_pruning(
    context: RunContext, model: nn.Module, groups: Sequence[Group]
) -> Callable[[int], GradualPruning] | None:
    """Return what, given the number of steps, shrinks channels during training; None if the recipe asks for none.

    Raises:
        PlanError: the target cannot be met.
    """
    recipe, section = context.recipe, context.recipe.train.gradual_pruning
    if section.start is None:
        return None
    budget = absolute_budget(context, model, groups)
    of = sum(group.channels for group in groups if group.reason is None)
    # Chosen on a copy, since the model in training is on the device and has other forwards.
    copied = copy_module(model).cpu().eval()

    def choose(trained: nn.Module, share: float) -> Mapping[str, set[int]]:
        copied.load_state_dict(trained.state_dict())
        search = channel_search(context, copied, groups)
        if budget is None:
            choice, reason = search.selector.select(threshold=recipe.slim.threshold), f"<= {recipe.slim.threshold:g}"
        else:
            goal = budget.at(share, search.size_model.dense)
            choice = _select(context, search, goal)
            reason = f"{goal.describe(search.size_model.size_without(choice.dead))} without them"
        context.reporter.info(f"train: {choice.pruned} of {of} channels chosen to shrink to zero ({reason})")
        return choice.dead

    options = section.model_dump()
    return lambda total_steps: GradualPruning(model, groups, choose, total_steps, **options)


def _select(context: RunContext, search: BudgetSearch, goal: Budget) -> Selection:
    """Select channels for a budget; one of time is measured, unless what is zero already meets it."""
    choice = search.select(goal)
    if goal.measure != "latency_ms" or search.are_zero(choice):
        return choice
    return context.latencies(search.model, search.groups).correct(search, goal, choice)


def _goals(context: RunContext, dense: nn.Module, groups: Sequence[Group]) -> list[Budget | None]:
    """Return the budget of each round, in equal ratios from dense size to target; [None] without a target."""
    recipe = context.recipe
    if not recipe.target.given:
        return [None]
    last = absolute_budget(context, dense, groups)
    full, steps = _size_search(context, dense, groups).size_model.dense, recipe.slim.steps
    return [last.at(k / steps, full) for k in range(1, steps + 1)]


def absolute_budget(context: RunContext, model: nn.Module, groups: Sequence[Group]) -> Budget | None:
    """Return the recipe's target in absolute numbers, for a run that begins with this model, or raise PlanError."""
    target = context.recipe.target.given
    return _size_search(context, model, groups).budget(**target) if target else None


def _size_search(context: RunContext, model: nn.Module, groups: Sequence[Group]) -> BudgetSearch:
    # Sizes and limits do not depend on scores, only on which groups have some.
    by_gate = context.recipe.slim.importance.name == "gate"
    scores = {group.id: np.zeros(group.channels) for group in groups if group.gates or not by_gate}
    return BudgetSearch(
        model, groups, context.shape, scores, **_measure(context, model, groups), **_limits(context.recipe)
    )


def _measure(context: RunContext, model: nn.Module, groups: Sequence[Group]) -> dict[str, Any]:
    """What the target limits and, for a budget of time, the latencies to predict from."""
    measure = search_measure(context.recipe.target.given)
    table = context.latencies(model, groups).table if measure == "latency_ms" else None
    return {"measure": measure, "latencies": table}


def channel_search(
    context: RunContext, model: nn.Module, groups: Sequence[Group], batches: int = LOSS_BATCHES
) -> BudgetSearch:
    """Return a search for channels, ranked by the recipe's criterion on so many batches of training data."""
    recipe = context.recipe
    importance = bind_options(registry.importances, recipe.slim.importance)
    scores = importance(model, groups, _training_losses(context, batches))
    cost: dict[str, Any] = {"cost_power": recipe.slim.cost_power, **_measure(context, model, groups)}
    return BudgetSearch(model, groups, context.shape, scores, **cost, **_limits(recipe))


def _limits(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe.slim, key) for key in ("scope", "min_channels", "round_to", "ignored_layers")}


def _training_losses(context: RunContext, batches: int) -> Any:
    """Return a function from a model to its training losses on a few batches, the same ones at every call."""
    recipe, train = context.recipe, context.tensors("train")
    loss = build_loss(context, recipe.train)
    order = torch.randperm(len(train), generator=seeded_generator(recipe.seed, "criterion", 0))

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for rows in order.split(recipe.train.batch_size)[:batches]:
            yield loss(model(normalize(train.images[rows])), train.targets[rows])

    return losses


def _print_notes(context: RunContext, stage: str, notes: Sequence[str]) -> None:
    for note in notes:
        context.reporter.info(f"{stage}: {note}")
