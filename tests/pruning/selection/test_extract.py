import re
import warnings

import numpy as np
import pytest
import torch
from helpers.marks import seeds, slow
from helpers.networks import Residual, Row, csnet_with_dead_gates, init_norms, params, small_csnet
from helpers.zoo import ZOO
from helpers.zoo_attention import ATTENTION
from torch import nn

import prunekit
from prunekit.errors import PlanError, PrunekitWarning
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract, plan_from_selection
from prunekit.pruning.selection.importance import gate as gate_scores
from prunekit.pruning.selection.importance import magnitude, random, taylor
from prunekit.pruning.selection.selector import Selector
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.slim import apply_plan, slim

# Most of these networks are pruned to their limits; other tests check the warnings.
pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def gate(model, norm, values):
    with torch.no_grad():
        model.get_submodule(norm).weight[: len(values)] = torch.tensor(values)


def test_serial_gates_prune_by_any_and_score_by_the_last():
    model = Row()
    init_norms(model)
    gate(model, "bn1", [0.0, 1e-6, 1.0])
    gate(model, "bn2", [1.0, 1.0, 1e-6])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    dead = dead_channels(groups, extract(model, groups, threshold=1e-3))
    # Channel 1 lives: the second norm scales up again what the first made small.
    assert dead["conv1"] == {0, 2}


def test_sum_is_pruned_only_where_both_sides_are_dead():
    model = Residual()
    init_norms(model)
    gate(model, "stem_bn", [0.0, 0.0, 1.0])
    gate(model, "bn", [0.0, 1.0, 0.0])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert dead_channels(groups, extract(model, groups))["stem"] == {0}


def test_best_channel_of_an_essential_layer_is_kept():
    model = Row()
    init_norms(model)
    gate(model, "bn3", [1e-5, 1e-5, 5e-5, 1e-5, 1e-5, 1e-5])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert extract(model, groups).groups["conv2"] == [2]
    assert len(extract(model, groups, min_channels=3).groups["conv2"]) == 3


def test_branch_may_be_removed_but_not_a_layer():
    model = small_csnet()
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


def test_layers_whose_live_branches_do_not_meet_keep_a_common_one():
    """One layer of the head keeps its fine branch and the next its coarse one: alone, each would starve the other."""
    model = small_csnet()
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


@pytest.mark.parametrize("seed", seeds(5, plain=2))
def test_plans_are_complete(seed):
    """Nothing that is kept reads from nothing, or is read by nothing."""
    model, groups, _ = csnet_with_dead_gates(seed, share=0.7, whole=0.4)
    plan = extract(model, groups)
    dead = dead_channels(groups, plan)
    settled, removed = Cutter(model, groups).complete(dead)
    assert settled == dead and removed == plan.removed
    assert all(any(split) for split in plan.splits.values())


def test_unusable_arguments_and_gates_are_refused():
    model = Row()
    init_norms(model)
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(PlanError, match="threshold=-1: must be at least 0"):
        extract(model, groups, threshold=-1)
    with pytest.raises(PlanError, match="min_channels=0: must be at least 1"):
        extract(model, groups, min_channels=0)
    gate(model, "bn1", [float("nan")])
    gate(model, "bn2", [float("nan")])
    with pytest.raises(PlanError, match="a gate of conv1 is not finite"):
        extract(model, groups)


def test_non_finite_norm_is_named_with_every_importance():
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
def test_layer_without_a_live_channel_is_named(gates, seed):
    torch.manual_seed(seed)
    model = small_csnet()
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


def test_warnings_are_issued_only_where_the_plan_differs_from_the_request():
    model, groups, _ = ready()
    with pytest.warns(PrunekitWarning, match=r"nothing is pruned: the smallest of 42 scores is 0\.\d+ \("):
        assert not any(dead_channels(groups, prunekit.extract(model, groups)).values())
    with pytest.warns(PrunekitWarning, match="kept for min_channels 1"):
        extract(model, groups, pruning_ratio=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = extract(model, groups, pruning_ratio=0.3, ignored_layers=["conv1"])
    # What is routine stands in the plan alone.
    assert [note.split(" ")[0] for note in plan.notes] == ["ignored_layers", "2"] and "cannot be pruned" in plan.notes[
        1
    ]
    assert prunekit.Plan.from_json(plan.to_json()).notes == plan.notes


def test_a_selection_is_what_extract_cuts_and_warns_of_nothing():
    model, groups, _ = ready()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection = Selector(model, groups, gate_scores(model, groups), min_channels=2).select(pruning_ratio=1.0)
    assert selection.warnings
    with pytest.warns(PrunekitWarning):
        plan = extract(model, groups, pruning_ratio=1.0, min_channels=2)
    assert plan_from_selection(model, groups, selection) == plan and dead_channels(groups, plan) == selection.dead


def test_given_scores_need_a_ratio_or_a_threshold():
    model, groups, _ = ready()
    with pytest.raises(PlanError, match="units of their own; give a pruning_ratio"):
        extract(model, groups, scores=magnitude(model, groups))


def test_effective_gates_are_the_default_scores():
    model, groups, _ = ready()
    assert extract(model, groups, pruning_ratio=0.4) == extract(
        model, groups, scores=gate_scores(model, groups), pruning_ratio=0.4
    )


@pytest.mark.parametrize("name", ["resnet_basic", slow("mobilenet_v2"), "resnext", slow("densenet")])
def test_every_importance_gives_a_plan_that_passes_the_equivalence_check(name):
    model, groups, example = ready(name)
    for scores in (
        magnitude(model, groups),
        taylor(model, groups, lambda model: [model(example).square().mean()]),
        random(model, groups, seed=1),
    ):
        plan = extract(model, groups, scores=scores, pruning_ratio=0.4, round_to=2)
        small, equivalence = slim(model, plan, example, groups=groups)
        assert equivalence.passed and params(small) < 0.9 * params(model)
        of = sum(group.channels for group in groups if group.reason is None)
        cut = dead_channels(groups, plan)
        assert 0.2 * of < sum(map(len, cut.values())) <= 0.4 * of
        assert all((group.channels - len(cut[group.id])) % 2 == 0 for group in groups if group.reason is None)


@pytest.mark.parametrize("seed", range(3))
def test_lower_scores_are_pruned_before_higher_ones(seed):
    model, groups, _ = ready()
    scores = random(model, groups, seed=seed)
    for scope in ("global", "layer"):
        dead = dead_channels(groups, extract(model, groups, scores=scores, pruning_ratio=0.5, scope=scope))
        for name, gone in dead.items():
            mask = np.isin(np.arange(len(scores[name])), list(gone))
            assert not mask.any() or scores[name][mask].max() < scores[name][~mask].min()


def test_round_to_divides_widths_whatever_the_number_of_heads():
    """The width of an axis is that of its heads times their channels; only the latter have to be a multiple."""
    model, example = ATTENTION["own_width"]().eval(), torch.randn(2, 3, 32, 32)
    groups = prunekit.find_groups(model, example)
    scores = {group.id: np.arange(group.channels, dtype=float) for group in groups if group.reason is None}
    plan = extract(model, groups, scores=scores, pruning_ratio=0.3, scope="layer", round_to=2)
    heads, channels = (len(plan.groups[name]) for name in ("blocks.0.attention.q", "blocks.0.attention.q#2"))
    assert (heads, channels) == (3, 6)  # of 4 heads and 6 channels, 0.3 of which are 1 each
    small = apply_plan(model, plan, example, groups)
    assert all(
        side % 2 == 0 for layer in small.modules() if isinstance(layer, nn.Linear) for side in layer.weight.shape
    )
