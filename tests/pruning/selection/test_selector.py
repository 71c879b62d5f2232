import math

import numpy as np
import pytest
import torch
from helpers.networks import Concat, Residual, Row, init_norms, small_csnet
from helpers.zoo import ZOO
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.selection.importance import random
from prunekit.pruning.selection.layer_matching import match_layers
from prunekit.pruning.selection.selector import Selector
from prunekit.pruning.surgery.cutter import Cutter


def build(network):
    torch.manual_seed(0)
    model = network()
    example = init_norms(model)
    return model, find_groups(model, example)


NETS = {"row": build(Row), "residual": build(Residual), "concat": build(Concat)}
BRANCHED = build(small_csnet)
GROUPED = build(ZOO["resnext"])


def prunable(groups):
    return [group for group in groups if group.reason is None]


def random_scores(groups, seed, ties=False):
    found = random(None, groups, seed=seed)
    return {name: np.round(values, 1) if ties else values for name, values in found.items()}


def border_scores(scores, dead):
    """Of each group with dead and living channels: its largest dead and its smallest living score."""
    for name, values in scores.items():
        mask = np.isin(np.arange(len(values)), list(dead[name]))
        if mask.any() and not mask.all():
            yield values[mask].max(), values[~mask].min()


@given(
    net=st.sampled_from(sorted(NETS)),
    seed=st.integers(0, 50),
    share=st.floats(0, 1),
    ties=st.booleans(),
    least=st.integers(1, 4),
)
@settings(max_examples=80)
def test_ratio_prunes_the_exact_number_of_channels(net, seed, share, ties, least):
    model, groups = NETS[net]
    scores = random_scores(groups, seed, ties)
    selector = Selector(model, groups, scores, min_channels=least)
    selection = selector.select(pruning_ratio=share)
    of = sum(group.channels for group in prunable(groups))
    assert selector.candidates == of and selection.requested == math.floor(share * of + 1e-9)
    # No more than requested, and fewer only where a group is down to min_channels.
    assert selection.pruned == sum(map(len, selection.dead.values())) == min(selection.requested, selector.max_count)
    assert all(
        group.channels - len(selection.dead[group.id]) >= min(least, group.channels) for group in prunable(groups)
    )
    assert all(dead <= alive for dead, alive in border_scores(scores, selection.dead))
    worst = max((scores[name][k] for name, dead in selection.dead.items() for k in dead), default=-1)
    for group in prunable(groups):
        if group.channels - len(selection.dead[group.id]) > least:
            assert min(scores[group.id][k] for k in range(group.channels) if k not in selection.dead[group.id]) >= worst


@given(seed=st.integers(0, 50), first=st.floats(0, 1), second=st.floats(0, 1))
@settings(max_examples=30)
def test_larger_count_prunes_a_superset(seed, first, second):
    model, groups = NETS["residual"]
    selector = Selector(model, groups, random_scores(groups, seed, ties=True))
    few, many = (selector.select(count=int(part * selector.candidates)).dead for part in sorted((first, second)))
    assert all(few[name] <= many[name] for name in few)


@given(
    seed=st.integers(0, 30), share=st.floats(0, 0.9), step=st.integers(1, 8), scope=st.sampled_from(["global", "layer"])
)
@settings(max_examples=60)
def test_kept_counts_are_multiples_or_the_whole_group(seed, share, step, scope):
    model, groups = NETS["row"]
    scores = random_scores(groups, seed)
    plain = Selector(model, groups, scores, scope=scope).select(pruning_ratio=share)
    selection = Selector(model, groups, scores, scope=scope, round_to=step).select(pruning_ratio=share)
    for group in prunable(groups):
        kept = group.channels - len(selection.dead[group.id])
        assert kept % step == 0 or kept == group.channels
        # Rounded up, by giving back the best of the dead.
        assert scope == "global" or selection.dead[group.id] <= plain.dead[group.id]
    assert all(dead <= alive for dead, alive in border_scores(scores, selection.dead))
    assert selection.pruned <= selection.requested


@given(seed=st.integers(0, 30), share=st.floats(0, 1), ties=st.booleans())
@settings(max_examples=40)
def test_layer_scope_prunes_the_ratio_of_each_group(seed, share, ties):
    model, groups = NETS["residual"]
    scores = random_scores(groups, seed, ties)
    selection = Selector(model, groups, scores, scope="layer").select(pruning_ratio=share)
    for group in prunable(groups):
        assert len(selection.dead[group.id]) == min(math.floor(share * group.channels + 1e-9), group.channels - 1)
    assert all(dead <= alive for dead, alive in border_scores(scores, selection.dead))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_every_layer_of_a_branched_network_keeps_a_channel(seed, share):
    model, groups = BRANCHED
    selector = Selector(model, groups, random_scores(groups, seed))
    selection = selector.select(pruning_ratio=share)
    settled, removed = Cutter(model, groups).complete(selection.dead)
    assert settled == selection.dead and removed == selection.removed
    assert not Cutter(model, groups).essential_modules(removed)
    if share < 0.9 and not removed:
        assert selection.pruned == selection.requested
    for layer in selector.layers:
        assert any(len(selection.dead[groups.id]) < groups.channels for groups in (selector.groups[p] for p in layer))


@given(seed=st.integers(0, 50), share=st.floats(0, 1), ties=st.booleans(), step=st.sampled_from([1, 2, 3]))
@settings(max_examples=40)
def test_groups_of_a_convolution_stay_equally_wide(seed, share, ties, step):
    model, groups = GROUPED
    scores = random_scores(groups, seed, ties)
    selector = Selector(model, groups, scores, round_to=step)
    selection = selector.select(pruning_ratio=share)
    settled, _ = Cutter(model, groups).complete(selection.dead)
    for group in prunable(groups):
        back = selection.dead[group.id] - settled[group.id]
        # One of each block, of a convolution that would have one input and one output left in each.
        assert not back or (len(back) == 4 and group.channels - len(selection.dead[group.id]) == 4)
    assert selection.pruned <= selection.requested
    # But for the last one of each block, and one that comes back where no more than one would be left on either side of
    # a convolution with groups, what was asked for is cut.
    grouped = sum(getattr(module, "groups", 1) > 1 for module in model.modules())
    assert step > 1 or selection.pruned > min(selection.requested, selector.max_count) - 4 * (1 + grouped)
    for group in prunable(groups):
        alive = np.array([k not in selection.dead[group.id] for k in range(group.channels)])
        if ".conv1" in group.id or ".conv2" in group.id:
            blocks = scores[group.id].reshape(4, -1), alive.reshape(4, -1)
            assert len(set(blocks[1].sum(1))) == 1
            for values, live in zip(*blocks, strict=True):
                assert live.all() or values[~live].max() <= values[live].min()


def test_channels_kept_for_convolution_groups_are_noted():
    model, groups = GROUPED
    scores = {name: np.ones(len(values)) for name, values in random_scores(groups, 0).items()}
    scores["layers.0.0.conv2"][:3] = 0
    selection = Selector(model, groups, scores).select(threshold=0.5)
    assert selection.requested == 3 and selection.pruned == 0
    assert selection.warnings == ["nothing is pruned: 3 kept so that the groups of a convolution stay of one size"]
    scores["layers.0.0.conv2"][[5, 7]] = 0
    selection = Selector(model, groups, scores).select(threshold=0.5)
    assert selection.dead["layers.0.0.conv2"] == {1, 2, 5, 7}
    assert selection.warnings == [
        "4 channels pruned where threshold 0.5 asks for 5: 1 kept so that the groups of a convolution stay of one size"
    ]


def test_equal_scores_are_spread_over_groups_and_noted():
    model, groups = NETS["row"]
    scores = {group.id: np.full(group.channels, 0.5) for group in prunable(groups)}
    selection = Selector(model, groups, scores).select(pruning_ratio=0.5)
    assert {name: len(dead) for name, dead in selection.dead.items()} == {"conv1": 4, "conv2": 3}
    assert selection.pruned == 7 and any("all 14 scores are 0.5" in note for note in selection.warnings)


def test_ties_prune_no_more_than_requested_and_are_noted():
    model, groups = NETS["row"]
    scores = {"conv1": np.array([0.1, *[0.2] * 7]), "conv2": np.array([0.2, 0.2, 0.2, 0.3, 0.3, 0.3])}
    selection = Selector(model, groups, scores).select(pruning_ratio=0.3)
    assert selection.pruned == 4
    assert selection.warnings == ["10 channels tie at the score 0.2, the last one pruned; 3 of them pruned"]
    by_layer = Selector(model, groups, scores, scope="layer").select(pruning_ratio=0.5)
    assert any(
        "in 1 group channels tie" in note and "conv1 7 at the score 0.2, 3 of them pruned" in note
        for note in by_layer.warnings
    )
    # No warning if the scores on both sides of the cut differ.
    assert Selector(model, groups, scores).select(count=1).warnings == []


def test_pruning_less_than_requested_is_noted_with_numbers():
    model, groups = NETS["row"]
    scores = random_scores(groups, 0)
    selection = Selector(model, groups, scores, min_channels=3).select(pruning_ratio=1.0)
    assert selection.warnings == ["8 channels pruned where pruning_ratio 1 asks for 14: 6 kept for min_channels 3"]
    selection = Selector(model, groups, scores, round_to=4).select(pruning_ratio=0.6)
    assert selection.requested == 8 and selection.pruned < 8
    assert (
        f"{selection.pruned} channels pruned where pruning_ratio 0.6 asks for 8: "
        f"{8 - selection.pruned} kept for round_to 4" in selection.warnings
    )
    low = {name: np.full(len(values), 1e-9) for name, values in scores.items()}
    selection = Selector(model, groups, low).select(threshold=1e-3)
    assert selection.warnings == [
        "12 channels pruned where threshold 0.001 asks for 14: 2 kept for min_channels 1",
        "no channel of conv1 and conv2 is above threshold 0.001 (the best has 1e-09), so only their best are kept; "
        "if they matter, train with a lower decay.weight",
    ]


def test_groups_without_a_multiple_of_round_to_are_noted():
    model, groups = NETS["row"]
    selection = Selector(model, groups, random_scores(groups, 0), round_to=8).select(pruning_ratio=0.5)
    assert selection.pruned == 0 and len(selection.dead["conv2"]) == 0
    assert any("round_to 8 is not met in 1 group" in note and "conv2 (6 of 6)" in note for note in selection.warnings)


def test_score_at_the_threshold_is_pruned():
    model, groups = NETS["row"]
    scores = {"conv1": np.array([0.0, *[1.0] * 7]), "conv2": np.array([0.5, 0.5, 0.6, 1, 1, 1])}
    for threshold, dead in ((0.0, {"conv1": {0}, "conv2": set()}), (0.5, {"conv1": {0}, "conv2": {0, 1}})):
        selection = Selector(model, groups, scores).select(threshold=threshold)
        assert selection.dead == dead and selection.warnings == []


def test_pruning_nothing_is_noted_with_the_smallest_score():
    model, groups = NETS["row"]
    scores = {"conv1": np.linspace(0.5, 1, 8), "conv2": np.linspace(0.25, 1, 6)}
    selection = Selector(model, groups, scores).select(threshold=0.1)
    assert selection.pruned == 0
    assert "the smallest of 14 scores is 0.25 (conv2), above threshold 0.1" in selection.warnings[0]
    assert (
        "pruning_ratio 0.01 of 14 channels is less than one"
        in Selector(model, groups, scores).select(pruning_ratio=0.01).warnings[0]
    )


def test_unprunable_groups_are_noted():
    model, groups = NETS["row"]
    selection = Selector(model, groups, random_scores(groups, 0)).select(pruning_ratio=0.5)
    assert "2 groups cannot be pruned: 1 the model's output; 1 the model's input" in selection.notes
    assert selection.warnings == []


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        ("conv1", {"conv1"}),
        ("depthwise", {"conv1"}),
        ("bn3", {"conv2"}),
        ("conv?", {"conv1", "conv2"}),
        ("*", {"conv1", "conv2"}),
    ],
)
def test_ignored_layers_are_kept_whole(pattern, whole):
    model, groups = NETS["row"]
    selection = Selector(model, groups, random_scores(groups, 1), ignored_layers=[pattern]).select(pruning_ratio=1.0)
    assert {name for name, dead in selection.dead.items() if not dead} == whole
    assert any(note.startswith(f"ignored_layers keeps {len(whole)} group") for note in selection.notes)
    assert (selection.warnings == ["nothing is pruned: ignored_layers keeps every group whole"]) == (len(whole) == 2)


def test_ignored_layers_keep_what_reads_them():
    model, groups = BRANCHED
    kept = match_layers(model, groups, ["stage1.1", "head.fuse"])
    for seed in range(6):
        selection = Selector(
            model, groups, random_scores(groups, seed), ignored_layers=["stage1.1", "head.fuse"]
        ).select(pruning_ratio=1.0)
        assert not any(selection.dead[name] for name in kept if name in selection.dead)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pruning_ratio": 1.5}, r"pruning_ratio=1.5: must be from 0 to 1; 0.3 prunes 30% of the channels"),
        ({"pruning_ratio": -0.1}, "pruning_ratio=-0.1: must be from 0 to 1"),
        ({"pruning_ratio": float("nan")}, "pruning_ratio=nan: must be from 0 to 1"),
        ({"threshold": -1.0}, "threshold=-1.0: must be at least 0"),
        ({"threshold": float("nan")}, "at least 0"),
        ({"count": 15}, "count=15: must be from 0 to the 14 channels"),
        ({}, "give one of threshold, pruning_ratio and count, not none of them"),
        ({"pruning_ratio": 0.5, "threshold": 0.1}, "not threshold and pruning_ratio"),
    ],
)
def test_numbers_out_of_range_are_refused(how, message):
    model, groups = NETS["row"]
    with pytest.raises(PlanError, match=message):
        Selector(model, groups, random_scores(groups, 0)).select(**how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_channels": 0}, "min_channels=0: must be at least 1"),
        ({"round_to": 0}, "round_to=0: must be at least 1"),
        ({"scope": "locally"}, "scope='locally': must be 'global', 'isomorphic' or 'layer'"),
    ],
)
def test_limits_out_of_range_are_refused(options, message):
    model, groups = NETS["row"]
    with pytest.raises(PlanError, match=message):
        Selector(model, groups, random_scores(groups, 0), **options)


def test_unusable_scores_are_refused():
    model, groups = NETS["row"]
    scores = random_scores(groups, 0)
    for wrong, message in (
        ({"conv1": scores["conv1"]}, "gives no scores for conv2"),
        ({**scores, "conv2": np.zeros(5)}, r"conv2 have shape \(5,\), not \(6,\)"),
        ({**scores, "conv2": np.full(6, np.inf)}, "a score of conv2 is not finite"),
    ):
        with pytest.raises(PlanError, match=message):
            Selector(model, groups, wrong)


def test_groups_without_gates_need_scores():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    selection = Selector(model, groups, {"0": np.arange(4.0)}).select(pruning_ratio=0.5)
    assert selection.dead == {"0": {0, 1}, "3": set()}
    assert selection.notes[0].startswith("6 channels in 1 group kept, since no gate") and not selection.warnings
    scored = Selector(model, groups, {"0": np.arange(4.0), "3": np.arange(6.0)}).select(pruning_ratio=0.5)
    assert scored.dead == {"0": {0, 1}, "3": {0, 1, 2}}
    with pytest.raises(PlanError, match="the channels of 3 pass no gate to rank them by; choose an importance that"):
        Selector(model, groups, {"0": np.arange(4.0)}, ratios={"3": 0.5})
    with pytest.raises(PlanError, match="importance gives no scores for 0"):
        Selector(model, groups, {"3": np.arange(6.0)})


def test_model_without_prunable_groups_is_noted():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    selection = Selector(model, groups, {}).select(pruning_ratio=0.5)
    assert selection.warnings == ["nothing is pruned: no group can be pruned"] and selection.pruned == 0
    with pytest.warns(UserWarning, match="no group can be pruned"):
        assert not extract(model, groups).removed
