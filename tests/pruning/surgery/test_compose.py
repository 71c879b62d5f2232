import pytest
import torch
from helpers.marks import seeds
from helpers.networks import Concat, Residual, Row, csnet_with_dead_gates, init_norms, small_csnet, zero_gates
from helpers.zoo_tokens import TOKENS

from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Plan
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.compose import compose, match_groups
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import apply_plan, slim


def twice(model, groups, example, seed):
    """Slim twice, with more zero gates the second time; return both plans and the models."""
    small, first = slim(model, extract(model, groups), example, groups=groups)
    between = find_groups(small, example)
    zero_gates(small, between, 0.4, seed + 100)
    smaller, second = slim(small, extract(small, between), example, groups=between)
    return first.plan, between, second.plan, smaller


@pytest.mark.parametrize("seed", seeds(6))
def test_composed_plan_equals_two_plans_in_sequence(seed):
    model, groups, example = csnet_with_dead_gates(seed, share=0.4, whole=0.4 * (seed % 2))
    first, between, second, smaller = twice(model, groups, example, seed)
    whole = compose(model, groups, first, between, second)
    again = apply_plan(small_csnet(), Plan.from_json(whole.to_json()), example)
    again.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(example), smaller.eval()(example))


@pytest.mark.parametrize("network", [Row, Residual, Concat])
def test_other_networks(network):
    model = network()
    example = init_norms(model)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.4)
    first, between, second, smaller = twice(model, groups, example, 1)
    again = apply_plan(network(), compose(model, groups, first, between, second), example)
    again.load_state_dict(smaller.state_dict())


def test_compose_rejects_plan_of_another_model():
    model, groups, example = csnet_with_dead_gates(0)
    first, between, second, _ = twice(model, groups, example, 0)
    name = next(n for n, kept in first.groups.items() if len(kept) > 2)
    wrong = first.model_copy(update={"groups": {**first.groups, name: first.groups[name][1:]}})
    with pytest.raises(PlanError, match="does not make this slim model"):
        compose(model, groups, wrong, between, second)


def test_groups_that_cannot_be_pruned_keep_their_places():
    """In an axis of three parts, heads and channels, the parts stay, and one head that is left is no group."""
    model, example = TOKENS["vit"](), torch.randn(2, 3, 32, 32)
    groups = find_groups(model, example)
    small, report = slim(model, make_plan(model, groups, {"attentions.0.qkv#2": {0}}), example, groups=groups)
    pairs = match_groups(groups, report.plan, find_groups(small, example))
    assert [(dense.id, one.id) for dense, one in pairs if one.id.startswith("attentions.0")] == [
        ("attentions.0.qkv#3", "attentions.0.qkv#2")
    ]
