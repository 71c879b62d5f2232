"""Random networks with random channels of zero weights, cut and compared with themselves on other images."""

import numpy as np
import pytest
import torch
from helpers.left_out import leave_out
from helpers.marks import seeds
from helpers.random_networks import RandomNetwork
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.silence import silence
from prunekit.pruning.surgery.equivalence import DEAD
from prunekit.pruning.surgery.plan_builder import dead_channels, make_plan
from prunekit.pruning.surgery.slim import slim

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def prepared(seed):
    torch.manual_seed(seed)
    model = RandomNetwork(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    images = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        model.train()(images)
    return model.eval(), images


@pytest.mark.parametrize("seed", [*seeds(400, plain=24), 630])  # 630: a carrier in a GroupNorm
def test_cut_of_silent_channels_changes_nothing(seed):
    model, images = prepared(seed)
    groups, draw = find_groups(model, images), np.random.default_rng(seed)
    free = [group for group in groups if group.reason is None]
    dead = {group.id: np.flatnonzero(draw.random(group.channels) < 0.4)[: group.channels - 1] for group in free}
    for group in free:
        silence(model, group, dead[group.id])
    try:
        small, report = slim(model, make_plan(model, groups, dead), images, groups=groups, exact=True)
    except PlanError as error:
        assert DEAD in str(error)
        return
    assert report.passed
    reference = leave_out(model, groups, dead_channels(groups, report.plan)).double()
    small.double()
    with torch.no_grad():
        for side in (32, 36):
            other = torch.randn(3, 3, side, side, dtype=torch.float64)
            try:
                expected = reference(other)
            except RuntimeError:
                assert side != 32  # Linear layers over the positions
                continue
            torch.testing.assert_close(small(other), expected, rtol=1e-6, atol=1e-7)
        if report.folded == report.carriers == 0:
            other = torch.randn(4, 3, 32, 32, dtype=torch.float64)
            torch.testing.assert_close(small.train()(other), reference.train()(other), rtol=1e-6, atol=1e-7)
    if sum(map(len, dead.values())) > report.given_back + report.carriers:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_most_channels_of_random_networks_can_be_pruned():
    """Nothing is refused but what passes an operation that is not followed."""
    channels = {True: 0, False: 0}
    for seed in range(40):
        model, images = prepared(seed)
        for group in find_groups(model, images):
            # Linear layers over all 64 positions are tied to convolutions.
            if group.reason not in ("the model's input", "the model's output") and group.channels < 64:
                channels[group.reason is None] += group.channels
                reasons = ("passes ", "regrouped by ", "what are not channels by ", "relies on its number")
                reasons += ("where a channel without weights is not zero",)
                assert group.reason is None or any(part in group.reason for part in reasons), group.reason
    assert channels[True] > channels[False]
