import numpy as np
import pytest
import torch
from helpers.latencies import cut, synthetic_ms, synthetic_table
from helpers.networks import csnet_with_dead_gates

import prunekit
from prunekit.backbones.resnet import resnet
from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.budget import BudgetSearch
from prunekit.pruning.selection.cost_model import ModelSize
from prunekit.pruning.selection.latency_path import removal_path
from prunekit.pruning.selection.target import Budget

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = resnet(depth=14, width=8)
    model(torch.randn(8, *SHAPE))
    model.eval()
    groups = find_groups(model, torch.randn(2, *SHAPE))
    return model, groups, synthetic_table(model, groups, SHAPE)


def drawn(groups, seed=0):
    draw = np.random.default_rng(seed)
    return {group.id: draw.random(group.channels) for group in groups if group.reason is None}


def test_path_goes_from_all_channels_to_few(measured):
    model, groups, table = measured
    search = BudgetSearch(model, groups, SHAPE, drawn(groups), measure="latency_ms", latencies=table)
    path = removal_path(search.selector, search.size_model)
    assert not path[0].any() and (np.diff(path, axis=0) >= 0).all()
    assert all((np.diff(path, axis=0) > 0).sum(1) == 1)
    assert search.smallest.latency_ms < 0.3 * search.size_model.dense.latency_ms


def test_less_importance_is_lost_than_by_rank(measured):
    model, groups, table = measured
    scores = drawn(groups)
    by_latency = BudgetSearch(model, groups, SHAPE, scores, measure="latency_ms", latencies=table)
    by_rank = BudgetSearch(model, groups, SHAPE, scores, measure="macs", latencies=table)
    chosen = by_latency.select(by_latency.budget(latency_ratio=0.5))
    budget = by_latency.budget(latency_ratio=0.5)
    ranked = next(
        choice
        for count in range(by_rank.selector.max_count)
        if budget.is_met(by_rank.size_model.size_without((choice := by_rank.selector.select(count=count)).dead))
    )
    lost = [sum(scores[name][list(channels)].sum() for name, channels in c.dead.items()) for c in (chosen, ranked)]
    assert budget.deviation(by_latency.size_model.size_without(chosen.dead)) == pytest.approx(0, abs=0.05)
    assert lost[0] < 0.9 * lost[1]


def test_slim_model_has_the_latency_and_the_size(measured):
    model, groups, table = measured
    images = torch.randn(4, *SHAPE)
    options = {"importance": "magnitude", "latencies": table}
    small, report = prunekit.Pruner(model, images, target={"latency_ratio": 0.6}, **options).step()
    assert report.equivalence.passed
    kept = {group.id: len(report.plan.kept(group)) for group in groups if group.reason is None}
    dense = synthetic_ms(model, SHAPE)
    assert synthetic_ms(cut(model, groups, kept), SHAPE) == pytest.approx(0.6 * dense, rel=0.06)
    assert synthetic_ms(small, SHAPE) == pytest.approx(0.6 * dense, rel=0.06)
    both = {"latency_ratio": 0.6, "params_ratio": 0.4}
    smaller, report = prunekit.Pruner(model, images, target=both, **options).step()
    assert report.after.params <= 0.4 * report.before.params and synthetic_ms(smaller, SHAPE) < 0.63 * dense


def test_whole_branches_are_removed_but_no_layer():
    model, groups, example = csnet_with_dead_gates(0, share=0.0)
    shape = tuple(example.shape[1:])
    table = synthetic_table(model, groups, shape)
    search = BudgetSearch(model, groups, shape, drawn(groups), measure="latency_ms", latencies=table)
    choice = search.select(search.budget(latency_ratio=0.5))
    whole = [g for g in groups if g.reason is None and len(choice.dead[g.id]) == g.channels]
    assert whole and not search.selector.kills_a_layer(
        np.array([len(choice.dead[group.id]) for group in search.selector.groups])
    )


def test_last_steps_are_undone_where_the_budget_allows(measured):
    model, groups, table = measured
    search = BudgetSearch(model, groups, SHAPE, drawn(groups), measure="latency_ms", latencies=table)
    for ratio in (0.35, 0.5, 0.65, 0.8):
        budget = search.budget(latency_ratio=ratio)
        choice = search.select(budget)
        dead = {name: len(channels) for name, channels in choice.dead.items()}
        assert budget.is_met(search.size_model.size_without(dead))
        met = [step for step in search._values if budget.is_met(search.size_model.size_without(named(search, step)))]
        # No group has fewer channels than at the first step of the path that meets the budget.
        assert all(dead[name] <= number for name, number in named(search, met[0]).items())


def named(search, step):
    return {group.id: int(number) for group, number in zip(search.selector.groups, step, strict=True)}


def test_unusable_arguments_are_refused(measured):
    model, groups, table = measured
    with pytest.raises(PlanError, match=r"latency_ratio=0\.5 needs a table of latencies"):
        prunekit.Pruner(model, torch.randn(2, *SHAPE), importance="magnitude", target={"latency_ratio": 0.5})
    with pytest.raises(PlanError, match="drop cost_power and scope"):
        BudgetSearch(model, groups, SHAPE, drawn(groups), measure="latency_ms", latencies=table, cost_power=1)
    negative = {name: values - 0.5 for name, values in drawn(groups).items()}
    with pytest.raises(PlanError, match="is negative; a latency needs"):
        BudgetSearch(model, groups, SHAPE, negative, measure="latency_ms", latencies=table)
    search = BudgetSearch(model, groups, SHAPE, drawn(groups), measure="latency_ms", latencies=table)
    dense = search.size_model.dense.latency_ms
    assert dense < 0.95 and search.budget(latency_ratio=0.95).goal == pytest.approx(0.95 * dense)
    with pytest.raises(PlanError, match=r"the budget of 5 ms is not below the [\d.]+ of the dense model"):
        search.budget(latency_ms=5)
    with pytest.raises(PlanError, match=r"cannot be met; choose one between [\d.]+ and [\d.]+ ms$"):
        search.budget(latency_ms=1e-4)
    with pytest.raises(PlanError, match="latency_ms and latency_ratio are given"):
        search.budget(latency_ms=1.0, latency_ratio=0.5)


def test_a_choice_that_misses_the_second_limit_is_not_accepted():
    dense = ModelSize(1000, 100, 10.0)
    budget = Budget.from_target(dense, latency_ratio=0.5, params_ratio=0.2)
    assert budget.accepts(ModelSize(200, 50, 5.5)) and not budget.accepts(ModelSize(201, 50, 4.0))
    assert not budget.accepts(ModelSize(100, 50, 6.0))
