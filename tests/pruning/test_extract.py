import pytest
import torch
from networks import Residual, Row, csnet_with_dead_gates, settle

from prunekit.backbones.csnet import csnet
from prunekit.errors import PlanError
from prunekit.pruning.extract import dead_channels, extract
from prunekit.pruning.groups import find_groups


def gate(model, norm, values):
    with torch.no_grad():
        model.get_submodule(norm).weight[: len(values)] = torch.tensor(values)


def test_a_row_dies_by_any_gate_and_is_scored_by_its_last():
    model = Row()
    settle(model)
    gate(model, "bn1", [0.0, 1e-6, 1.0])
    gate(model, "bn2", [1.0, 1.0, 1e-6])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    dead = dead_channels(groups, extract(model, groups, threshold=1e-3))
    # Channel 1 lives: the second norm scales up again what the first made small.
    assert dead["conv1"] == {0, 2}


def test_a_sum_dies_only_on_both_sides():
    model = Residual()
    settle(model)
    gate(model, "stem_bn", [0.0, 0.0, 1.0])
    gate(model, "bn", [0.0, 1.0, 0.0])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert dead_channels(groups, extract(model, groups))["stem"] == {0}


def test_the_best_channel_stays_where_the_model_needs_one():
    model = Row()
    settle(model)
    gate(model, "bn3", [1e-5, 1e-5, 5e-5, 1e-5, 1e-5, 1e-5])
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert extract(model, groups).groups["conv2"] == [2]
    assert len(extract(model, groups, min_channels=3).groups["conv2"]) == 3


def test_a_branch_may_vanish_but_not_a_layer():
    model = csnet(10)
    example = settle(model)
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
    example = settle(model)
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
    from prunekit.pruning.surgery import Cutter

    model, groups, _ = csnet_with_dead_gates(seed, share=0.7, whole=0.4)
    plan = extract(model, groups)
    dead = dead_channels(groups, plan)
    settled, removed = Cutter(model, groups).settle(dead)
    assert settled == dead and removed == plan.removed
    assert all(any(split) for split in plan.splits.values())


def test_what_cannot_be_read_is_refused():
    model = Row()
    settle(model)
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(PlanError, match="at least 0"):
        extract(model, groups, threshold=-1)
    with pytest.raises(PlanError, match="at least 1"):
        extract(model, groups, min_channels=0)
    gate(model, "bn1", [float("nan")])
    gate(model, "bn2", [float("nan")])
    with pytest.raises(PlanError, match="a gate of conv1 is not finite"):
        extract(model, groups)
