import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.silence import silence
from prunekit.pruning.plan import Group, Statistic
from prunekit.pruning.surgery.masked_statistics import mask_statistics
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim

KEPT = torch.tensor([0, 2, 3, 5])


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x):
        return self.function(x, self.weight)


def masked(function, operation, axis):
    statistic = Statistic(module="", operation=operation, call=0, axis=axis)
    group = Group(id="a", channels=6, members=[], statistics=[statistic])
    return mask_statistics(Apply(function), [group], {"a": {1, 4}})


def place(part):
    return torch.zeros(*part.shape[:-1], 6).index_copy(-1, KEPT, part)


@pytest.mark.parametrize(
    ("operation", "function", "expected"),
    [
        (
            "layer_norm",
            lambda x, w: F.layer_norm(x, (6,), w, w),
            lambda x, w: place(F.layer_norm(x[..., KEPT], (4,), w[KEPT], w[KEPT])),
        ),
        ("rms_norm", lambda x, w: F.rms_norm(x, (6,), w), lambda x, w: place(F.rms_norm(x[..., KEPT], (4,), w[KEPT]))),
        ("mean", lambda x, w: x.mean(-1, keepdim=True), lambda x, w: x[..., KEPT].mean(-1, keepdim=True)),
        (
            "scaled_dot_product_attention",
            lambda x, w: F.scaled_dot_product_attention(x, x, x),
            lambda x, w: F.scaled_dot_product_attention(x, x, x, scale=0.5),
        ),
    ],
)
def test_statistic_over_what_is_left(operation, function, expected):
    model, x = masked(function, operation, 2), torch.randn(2, 3, 6)
    torch.testing.assert_close(model(x), expected(x, model.model.weight))


def test_group_norm_over_what_is_left():
    statistic = Statistic(module="", operation="group_norm", call=0, axis=1, repeats=((2, 3),))
    group = Group(id="a", channels=3, members=[], statistics=[statistic])
    model = mask_statistics(Apply(lambda x, w: F.group_norm(x, 2, w)), [group], {"a": {1}})
    x, kept = torch.randn(2, 6, 5), torch.tensor([0, 2, 3, 5])
    expected = torch.zeros_like(x).index_copy(1, kept, F.group_norm(x[:, kept], 2, model.model.weight[kept]))
    torch.testing.assert_close(model(x), expected)


def test_other_calls_are_left_alone():
    model = masked(lambda x, w: (x.mean(-1), x.mean(-1)), "mean", 2)
    first, second = model(x := torch.randn(2, 3, 6))
    torch.testing.assert_close(first, x[..., KEPT].mean(-1))
    torch.testing.assert_close(second, x.mean(-1))


def test_model_without_dead_statistics_is_returned_as_it_is():
    model = nn.Linear(2, 2)
    assert mask_statistics(model, [Group(id="a", channels=2, members=[])], {"a": {1}}) is model


class MeanOfPositions(nn.Module):
    """Channels without weights are constants, from the bias of a layer of positions, and pass a mean over those."""

    def __init__(self):
        super().__init__()
        self.conv, self.positions, self.head = nn.Conv1d(3, 8, 1), nn.Linear(6, 10), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.positions(self.conv(x)).mean(2))


class NormWithoutWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean(1))


@pytest.mark.parametrize("network", [MeanOfPositions, NormWithoutWeights])
def test_constants_are_measured_without_what_statistics_leave_out(network):
    torch.manual_seed(0)
    model, example = network().eval(), torch.randn(4, 3, 6)
    groups = find_groups(model, example)
    dead = {group.id: {1, 4} for group in groups if group.reason is None}
    assert dead
    for group in groups:
        if group.id in dead:
            silence(model, group, np.array([1, 4]))
    _, report = slim(model, make_plan(model, groups, dead), example, groups=groups, exact=True)
    assert report.passed and report.given_back == 0
