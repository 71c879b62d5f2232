import re
import warnings

import numpy as np
import pytest
import torch
from helpers.networks import Residual, Row, csnet_with_dead_gates, init_norms, params
from helpers.zoo import ZOO

import prunekit
from prunekit.backbones.csnet import csnet
from prunekit.errors import PlanError, PrunekitWarning
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract, plan_of_choice
from prunekit.pruning.selection.importance import gate as gate_scores
from prunekit.pruning.selection.importance import magnitude, random, taylor
from prunekit.pruning.selection.selector import Selector
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.make_plan import dead_channels
from prunekit.pruning.surgery.slim import slim

# Most of these networks are cut to their limits, and that this is said has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def gate(model, norm, values):
    with torch.no_grad():
        model.get_submodule(norm).weight[: len(values)] = torch.tensor(values)


def test_a_row_dies_by_any_gate_and_is_scored_by_its_last():
    model = Row()
    init_norms(model)
    gate(model, "bn1", [0.0, 1e-6, 1.0])
    gate(model, "bn2", [1.0, 1.0, 1e-6])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    dead = dead_channels(groups, extract(model, groups, threshold=1e-3))
    # Channel 1 lives: the second norm scales up again what the first made small.
    assert dead["conv1"] == {0, 2}


def test_a_sum_dies_only_on_both_sides():
    model = Residual()
    init_norms(model)
    gate(model, "stem_bn", [0.0, 0.0, 1.0])
    gate(model, "bn", [0.0, 1.0, 0.0])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert dead_channels(groups, extract(model, groups))["stem"] == {0}


def test_the_best_channel_stays_where_the_model_needs_one():
    model = Row()
    init_norms(model)
    gate(model, "bn3", [1e-5, 1e-5, 5e-5, 1e-5, 1e-5, 1e-5])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert extract(model, groups).groups["conv2"] == [2]
    assert len(extract(model, groups, min_channels=3).groups["conv2"]) == 3


def test_a_branch_may_vanish_but_not_a_layer():
    model = csnet(10)
    example = init_norms(model)
    for branch in "01":
        gate(model, f"stage1.1.depthwise2_out.norms.{branch}", [0.0] * 5)
    with torch.no_grad():
        model.stage1[1].depthwise2_out.norms["1"].weight[3] = 1e-9
    groups = find_groups(model, example)
    plan = extract(model, groups)
    assert plan.splits["stage1.1"] == [0, 1]
    assert plan.groups["stage1.1.mix.paths.0to1"] == [3]
    assert "stage1.1.mix.paths.0to0" in plan.removed and "stage1.2.mix.paths.0to1" in plan.removed


def test_layers_whose_living_branches_do_not_meet_are_kept_apart_from_death():
    """One layer of the head keeps its fine branch and the next its coarse one: alone, each would starve the other."""
    model = csnet(10)
    example = init_norms(model)
    with torch.no_grad():
        for b in "12":
            model.head.fuse.mix_out.norms[b].weight.zero_()
        for b in "02":
            model.head.dilated.out.norms[b].weight.zero_()
    groups = find_groups(model, example)
    plan = extract(model, groups)
    split = plan.splits
    assert any(a and b for a, b in zip(split["head.fuse"], split["head.dilated"], strict=True))
    assert split["head.merge"][0] > 0


@pytest.mark.parametrize("seed", range(5))
def test_plans_are_settled(seed):
    """Nothing that is kept reads from nothing, or is read by nothing."""
    model, groups, _ = csnet_with_dead_gates(seed, share=0.7, whole=0.4)
    plan = extract(model, groups)
    dead = dead_channels(groups, plan)
    settled, removed = Cutter(model, groups).complete(dead)
    assert settled == dead and removed == plan.removed
    assert all(any(split) for split in plan.splits.values())


def test_what_cannot_be_read_is_refused():
    model = Row()
    init_norms(model)
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(PlanError, match="at least 0"):
        extract(model, groups, threshold=-1)
    with pytest.raises(PlanError, match="at least 1"):
        extract(model, groups, min_channels=0)
    gate(model, "bn1", [float("nan")])
    gate(model, "bn2", [float("nan")])
    with pytest.raises(PlanError, match="a gate of conv1 is not finite"):
        extract(model, groups)


def test_a_norm_that_is_not_finite_is_named_whatever_the_criterion():
    model = Row()
    example = init_norms(model)
    groups = find_groups(model, example)
    model.bn2.running_mean[4] = float("nan")
    with pytest.raises(PlanError, match=r"bn2\.running_mean is nan in 1 place of"):
        extract(model, groups)
    model.bn2.running_mean[4] = 0
    model.bn3.running_var[2] = float("inf")
    with pytest.raises(PlanError, match=r"a gate of conv2 is not finite \(bn3\.running_var is inf\)"):
        extract(model, groups)
    model.bn3.running_var[2] = 1
    gate(model, "bn1", [float("inf")])
    with pytest.raises(PlanError, match=r"a weight of conv1 .* is not finite \(bn1\.weight is inf\)"):
        magnitude(model, groups)


# With some weights the images of a batch differ in the last bit, though nothing of them gets through.
@pytest.mark.parametrize("gates, seed", [(0.0, 0), (0.0, 2), (1e-5, 0)])
def test_a_layer_without_a_living_channel_is_named(gates, seed):
    torch.manual_seed(seed)
    model = csnet(10)
    example = init_norms(model)
    for branch in "01":
        gate(model, f"stage1.1.depthwise2_out.norms.{branch}", [gates] * 5)
    groups = find_groups(model, example)
    name = "stage1.1.mix.paths.0to0 + stage1.1.mix.paths.0to1"
    with pytest.warns(
        PrunekitWarning, match=rf"no channel of {re.escape(name)} is above threshold 0.001 \(the best has"
    ):
        plan = extract(model, groups)
    assert sum(plan.splits["stage1.1"]) == 1
    if gates == 0:
        match = f"the network is dead, every gate of {re.escape(name)} is zero; train with a lower decay.weight"
        with pytest.raises(PlanError, match=match):
            slim(model, plan, example, groups=groups)


def ready(name="resnet_basic"):
    torch.manual_seed(0)
    model = ZOO[name]()
    example = init_norms(model)
    return model, find_groups(model, example), example


def test_the_user_is_warned_of_what_is_not_as_asked_and_of_nothing_else():
    model, groups, _ = ready()
    with pytest.warns(PrunekitWarning, match=r"nothing is cut: the smallest of 42 scores is 0\.\d+ \("):
        assert not any(dead_channels(groups, prunekit.extract(model, groups)).values())
    with pytest.warns(PrunekitWarning, match="kept for min_channels 1"):
        extract(model, groups, share=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = extract(model, groups, share=0.3, ignored_layers=["conv1"])
    # What is routine stands in the plan alone.
    assert [note.split(" ")[0] for note in plan.notes] == ["ignored_layers", "2"] and "cannot be cut" in plan.notes[1]
    assert prunekit.Plan.from_json(plan.to_json()).notes == plan.notes


def test_a_choice_is_what_extract_cuts_and_warns_of_nothing():
    model, groups, _ = ready()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = Selector(model, groups, gate_scores(model, groups), min_channels=2).cut(share=1.0)
    assert choice.urgent
    with pytest.warns(PrunekitWarning):
        plan = extract(model, groups, share=1.0, min_channels=2)
    assert plan_of_choice(model, groups, choice) == plan and dead_channels(groups, plan) == choice.dead


def test_scores_of_a_criterion_need_a_share_or_a_threshold():
    model, groups, _ = ready()
    with pytest.raises(PlanError, match="units of their own; give a share"):
        extract(model, groups, scores=magnitude(model, groups))


def test_the_effective_gates_are_the_default_scores():
    model, groups, _ = ready()
    assert extract(model, groups, share=0.4) == extract(model, groups, scores=gate_scores(model, groups), share=0.4)


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v2", "resnext", "densenet"])
def test_every_criterion_gives_a_plan_that_slims_with_equivalence_check(name):
    model, groups, example = ready(name)
    for scores in (
        magnitude(model, groups),
        taylor(model, groups, lambda model: [model(example).square().mean()]),
        random(model, groups, seed=1),
    ):
        plan = extract(model, groups, scores=scores, share=0.4, round_to=2)
        small, equivalence = slim(model, plan, example, groups=groups)
        assert equivalence.passed and params(small) < 0.9 * params(model)
        of = sum(group.channels for group in groups if group.reason is None)
        cut = dead_channels(groups, plan)
        assert 0.2 * of < sum(map(len, cut.values())) <= 0.4 * of
        assert all((group.channels - len(cut[group.id])) % 2 == 0 for group in groups if group.reason is None)


@pytest.mark.parametrize("seed", range(3))
def test_a_lower_score_never_survives_a_higher_one(seed):
    model, groups, _ = ready()
    scores = random(model, groups, seed=seed)
    for scope in ("global", "layer"):
        dead = dead_channels(groups, extract(model, groups, scores=scores, share=0.5, scope=scope))
        for name, gone in dead.items():
            mask = np.isin(np.arange(len(scores[name])), list(gone))
            assert not mask.any() or scores[name][mask].max() < scores[name][~mask].min()
