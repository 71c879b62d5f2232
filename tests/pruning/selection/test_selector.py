import math

import numpy as np
import pytest
import torch
from helpers.networks import Concat, Residual, Row, init_norms
from helpers.zoo import ZOO
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.backbones.csnet import csnet
from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.selection.importance import random
from prunekit.pruning.selection.layers import match_layers
from prunekit.pruning.selection.selector import Selector
from prunekit.pruning.surgery.cutter import Cutter


def built(network):
    torch.manual_seed(0)
    model = network()
    example = init_norms(model)
    return model, find_groups(model, example)


NETS = {"row": built(Row), "residual": built(Residual), "concat": built(Concat)}
BRANCHED = built(lambda: csnet(10))
GROUPED = built(ZOO["resnext"])


def free(groups):
    return [group for group in groups if group.reason is None]


def scored(groups, seed, ties=False):
    found = random(None, groups, seed=seed)
    return {name: np.round(values, 1) if ties else values for name, values in found.items()}


def rank(scores, dead):
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
@settings(max_examples=80, deadline=None)
def test_a_share_is_cut_to_the_channel(net, seed, share, ties, least):
    model, groups = NETS[net]
    scores = scored(groups, seed, ties)
    chooser = Selector(model, groups, scores, min_channels=least)
    choice = chooser.cut(share=share)
    of = sum(group.channels for group in free(groups))
    assert chooser.channels == of and choice.asked == math.floor(share * of + 1e-9)
    # No more than asked, and fewer only where a group has come down to min_channels.
    assert choice.cut == sum(map(len, choice.dead.values())) == min(choice.asked, chooser.most)
    assert all(group.channels - len(choice.dead[group.id]) >= min(least, group.channels) for group in free(groups))
    assert all(dead <= alive for dead, alive in rank(scores, choice.dead))
    worst = max((scores[name][k] for name, dead in choice.dead.items() for k in dead), default=-1)
    for group in free(groups):
        if group.channels - len(choice.dead[group.id]) > least:
            assert min(scores[group.id][k] for k in range(group.channels) if k not in choice.dead[group.id]) >= worst


@given(seed=st.integers(0, 50), first=st.floats(0, 1), second=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_larger_count_cuts_all_that_a_smaller_one_does(seed, first, second):
    model, groups = NETS["residual"]
    chooser = Selector(model, groups, scored(groups, seed, ties=True))
    few, many = (chooser.cut(count=int(part * chooser.channels)).dead for part in sorted((first, second)))
    assert all(few[name] <= many[name] for name in few)


@given(
    seed=st.integers(0, 30), share=st.floats(0, 0.9), step=st.integers(1, 8), scope=st.sampled_from(["global", "layer"])
)
@settings(max_examples=60, deadline=None)
def test_kept_counts_are_multiples_or_the_whole_group(seed, share, step, scope):
    model, groups = NETS["row"]
    scores = scored(groups, seed)
    plain = Selector(model, groups, scores, scope=scope).cut(share=share)
    choice = Selector(model, groups, scores, scope=scope, round_to=step).cut(share=share)
    for group in free(groups):
        kept = group.channels - len(choice.dead[group.id])
        assert kept % step == 0 or kept == group.channels
        # Rounded up, by giving back the best of the dead.
        assert scope == "global" or choice.dead[group.id] <= plain.dead[group.id]
    assert all(dead <= alive for dead, alive in rank(scores, choice.dead))
    assert choice.cut <= choice.asked


@given(seed=st.integers(0, 30), share=st.floats(0, 1), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_share_of_each_layer(seed, share, ties):
    model, groups = NETS["residual"]
    scores = scored(groups, seed, ties)
    choice = Selector(model, groups, scores, scope="layer").cut(share=share)
    for group in free(groups):
        assert len(choice.dead[group.id]) == min(math.floor(share * group.channels + 1e-9), group.channels - 1)
    assert all(dead <= alive for dead, alive in rank(scores, choice.dead))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_every_layer_of_a_branched_network_lives(seed, share):
    model, groups = BRANCHED
    chooser = Selector(model, groups, scored(groups, seed))
    choice = chooser.cut(share=share)
    settled, removed = Cutter(model, groups).complete(choice.dead)
    assert settled == choice.dead and removed == choice.removed
    assert not Cutter(model, groups).essential_modules(removed)
    if share < 0.9 and not removed:
        assert choice.cut == choice.asked
    for layer in chooser.layers:
        assert any(len(choice.dead[groups.id]) < groups.channels for groups in (chooser.groups[p] for p in layer))


@given(seed=st.integers(0, 50), share=st.floats(0, 1), ties=st.booleans(), step=st.sampled_from([1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_the_groups_of_a_convolution_stay_of_one_size(seed, share, ties, step):
    model, groups = GROUPED
    scores = scored(groups, seed, ties)
    chooser = Selector(model, groups, scores, round_to=step)
    choice = chooser.cut(share=share)
    settled, _ = Cutter(model, groups).complete(choice.dead)
    for group in free(groups):
        back = choice.dead[group.id] - settled[group.id]
        # One of each block, of a convolution that would have one input and one output left in each.
        assert not back or (len(back) == 4 and group.channels - len(choice.dead[group.id]) == 4)
    assert choice.cut <= choice.asked
    # But for the last one of each block, and one that comes back where no more than one would be left on either side of
    # a convolution with groups, what was asked for is cut.
    grouped = sum(getattr(module, "groups", 1) > 1 for module in model.modules())
    assert step > 1 or choice.cut > min(choice.asked, chooser.most) - 4 * (1 + grouped)
    for group in free(groups):
        alive = np.array([k not in choice.dead[group.id] for k in range(group.channels)])
        if ".conv1" in group.id or ".conv2" in group.id:
            blocks = scores[group.id].reshape(4, -1), alive.reshape(4, -1)
            assert len(set(blocks[1].sum(1))) == 1
            for values, live in zip(*blocks, strict=True):
                assert live.all() or values[~live].max() <= values[live].min()


def test_what_the_groups_of_a_convolution_keep_is_said():
    model, groups = GROUPED
    scores = {name: np.ones(len(values)) for name, values in scored(groups, 0).items()}
    scores["layers.0.0.conv2"][:3] = 0
    choice = Selector(model, groups, scores).cut(threshold=0.5)
    assert choice.asked == 3 and choice.cut == 0
    assert choice.urgent == ["nothing is cut: 3 kept so that the groups of a convolution stay of one size"]
    scores["layers.0.0.conv2"][[5, 7]] = 0
    choice = Selector(model, groups, scores).cut(threshold=0.5)
    assert choice.dead["layers.0.0.conv2"] == {1, 2, 5, 7}
    assert choice.urgent == [
        "4 channels cut where threshold 0.5 asks for 5: 1 kept so that the groups of a convolution stay of one size"
    ]


def test_equal_scores_are_cut_to_the_share_and_spread_and_said():
    model, groups = NETS["row"]
    scores = {group.id: np.full(group.channels, 0.5) for group in free(groups)}
    choice = Selector(model, groups, scores).cut(share=0.5)
    assert {name: len(dead) for name, dead in choice.dead.items()} == {"conv1": 4, "conv2": 3}
    assert choice.cut == 7 and any("all 14 scores are 0.5" in note for note in choice.urgent)


def test_ties_at_the_border_cut_no_more_than_asked_and_are_said():
    model, groups = NETS["row"]
    scores = {"conv1": np.array([0.1, *[0.2] * 7]), "conv2": np.array([0.2, 0.2, 0.2, 0.3, 0.3, 0.3])}
    choice = Selector(model, groups, scores).cut(share=0.3)
    assert choice.cut == 4
    assert choice.urgent == ["10 channels tie at the score 0.2, where the cut ends; 3 of them cut"]
    by_layer = Selector(model, groups, scores, scope="layer").cut(share=0.5)
    assert any(
        "in 1 group channels tie" in note and "conv1 7 at the score 0.2, 3 of them cut" in note
        for note in by_layer.urgent
    )
    # At a border between scores that differ nothing is said.
    assert Selector(model, groups, scores).cut(count=1).urgent == []


def test_what_is_less_than_asked_is_said_with_numbers():
    model, groups = NETS["row"]
    scores = scored(groups, 0)
    choice = Selector(model, groups, scores, min_channels=3).cut(share=1.0)
    assert choice.urgent == ["8 channels cut where share 1 asks for 14: 6 kept for min_channels 3"]
    choice = Selector(model, groups, scores, round_to=4).cut(share=0.6)
    assert choice.asked == 8 and choice.cut < 8
    assert (
        f"{choice.cut} channels cut where share 0.6 asks for 8: {8 - choice.cut} kept for round_to 4" in choice.urgent
    )
    low = {name: np.full(len(values), 1e-9) for name, values in scores.items()}
    choice = Selector(model, groups, low).cut(threshold=1e-3)
    assert choice.urgent == [
        "12 channels cut where threshold 0.001 asks for 14: 2 kept for min_channels 1",
        "no channel of conv1 and conv2 is above threshold 0.001 (the best has 1e-09), so their best alone stay; if "
        "they matter, train with a lower decay.weight",
    ]


def test_a_count_that_cannot_be_rounded_is_said():
    model, groups = NETS["row"]
    choice = Selector(model, groups, scored(groups, 0), round_to=8).cut(share=0.5)
    assert choice.cut == 0 and len(choice.dead["conv2"]) == 0
    assert any("round_to 8 is not met in 1 group" in note and "conv2 (6 of 6)" in note for note in choice.urgent)


def test_a_score_at_the_threshold_is_dead():
    model, groups = NETS["row"]
    scores = {"conv1": np.array([0.0, *[1.0] * 7]), "conv2": np.array([0.5, 0.5, 0.6, 1, 1, 1])}
    for threshold, dead in ((0.0, {"conv1": {0}, "conv2": set()}), (0.5, {"conv1": {0}, "conv2": {0, 1}})):
        choice = Selector(model, groups, scores).cut(threshold=threshold)
        assert choice.dead == dead and choice.urgent == []


def test_nothing_cut_is_said_with_the_smallest_score():
    model, groups = NETS["row"]
    scores = {"conv1": np.linspace(0.5, 1, 8), "conv2": np.linspace(0.25, 1, 6)}
    choice = Selector(model, groups, scores).cut(threshold=0.1)
    assert choice.cut == 0
    assert "the smallest of 14 scores is 0.25 (conv2), above threshold 0.1" in choice.urgent[0]
    assert "share 0.01 of 14 channels is less than one" in Selector(model, groups, scores).cut(share=0.01).urgent[0]


def test_what_cannot_be_cut_is_noted():
    model, groups = NETS["row"]
    choice = Selector(model, groups, scored(groups, 0)).cut(share=0.5)
    assert "2 groups cannot be cut: 1 the model's output; 1 the model's input" in choice.notes
    assert choice.urgent == []


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
def test_layers_to_keep(pattern, whole):
    model, groups = NETS["row"]
    choice = Selector(model, groups, scored(groups, 1), ignored_layers=[pattern]).cut(share=1.0)
    assert {name for name, dead in choice.dead.items() if not dead} == whole
    assert any(note.startswith(f"ignored_layers keeps {len(whole)} group") for note in choice.notes)
    assert (choice.urgent == ["nothing is cut: ignored_layers keeps every group whole"]) == (len(whole) == 2)


def test_a_layer_to_keep_holds_what_reads_it():
    model, groups = BRANCHED
    kept = match_layers(model, groups, ["stage1.1", "head.fuse"])
    for seed in range(6):
        choice = Selector(model, groups, scored(groups, seed), ignored_layers=["stage1.1", "head.fuse"]).cut(share=1.0)
        assert not any(choice.dead[name] for name in kept if name in choice.dead)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"share": 1.5}, "share is from 0 to 1, got 1.5; 0.3 cuts 30 %"),
        ({"share": -0.1}, "share is from 0 to 1"),
        ({"share": float("nan")}, "share is from 0 to 1"),
        ({"threshold": -1.0}, "at least 0"),
        ({"threshold": float("nan")}, "at least 0"),
        ({"count": 15}, "from 0 to the 14 channels"),
        ({}, "give one of threshold, share and count, not none of them"),
        ({"share": 0.5, "threshold": 0.1}, "not threshold and share"),
    ],
)
def test_numbers_out_of_range_are_refused(how, message):
    model, groups = NETS["row"]
    with pytest.raises(PlanError, match=message):
        Selector(model, groups, scored(groups, 0)).cut(**how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_channels": 0}, "min_channels is at least 1, got 0"),
        ({"round_to": 0}, "round_to is at least 1, got 0"),
        ({"scope": "locally"}, "scope is 'global' or 'layer', got 'locally'"),
    ],
)
def test_limits_out_of_range_are_refused(options, message):
    model, groups = NETS["row"]
    with pytest.raises(PlanError, match=message):
        Selector(model, groups, scored(groups, 0), **options)


def test_scores_that_do_not_fit_are_refused():
    model, groups = NETS["row"]
    scores = scored(groups, 0)
    for wrong, message in (
        ({"conv1": scores["conv1"]}, "gives no scores for conv2"),
        ({**scores, "conv2": np.zeros(5)}, r"conv2 have shape \(5,\), not \(6,\)"),
        ({**scores, "conv2": np.full(6, np.inf)}, "a score of conv2 is not finite"),
    ):
        with pytest.raises(PlanError, match=message):
            Selector(model, groups, wrong)


def test_a_model_that_cannot_be_cut_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    choice = Selector(model, groups, {}).cut(share=0.5)
    assert choice.urgent == ["nothing is cut: no group can be cut"] and choice.cut == 0
    with pytest.warns(UserWarning, match="no group can be cut"):
        assert not extract(model, groups).removed
