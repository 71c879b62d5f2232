import numpy as np
import pytest
import torch
from torch import nn

from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.silence import silence, silencing_rows, silent_channels

DEAD = np.array([1, 4])


class Ungated(nn.Module):
    """Two producers with and without a bias, a depthwise convolution with one and a PReLU; read after a flatten."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.ConvTranspose2d(3, 6, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.act = nn.PReLU(6)
        self.hidden, self.out = nn.Linear(6 * 16, 5), nn.Linear(5, 2)

    def features(self, x):
        return self.act(self.depthwise(self.a(x) + self.b(x)))

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.features(x).flatten(1))))


@pytest.fixture
def made():
    torch.manual_seed(0)
    model, example = Ungated(), torch.randn(2, 3, 4, 4)
    return model, {group.id: group for group in find_groups(model, example)}, example


def test_silenced_channels_are_zero_and_the_others_stay(made):
    model, groups, example = made
    before = model.features(example)
    silence(model, groups["a"], DEAD)
    after = model.features(example)
    assert not after[:, DEAD].any()
    kept = [0, 2, 3, 5]
    assert torch.equal(after[:, kept], before[:, kept])
    assert silent_channels(model, groups["a"]).nonzero()[0].tolist() == DEAD.tolist()
    assert gate_scores(model, groups["a"]).tolist() == [np.inf, 0, np.inf, np.inf, 0, np.inf]
    assert not silent_channels(model, groups["hidden"]).any()


def test_slopes_and_readers_are_left_alone(made):
    model, groups, _ = made
    names = {rows.tensor for rows in silencing_rows(model, groups["a"])}
    assert names == {"a.weight", "a.bias", "b.weight", "depthwise.weight", "depthwise.bias"}


@pytest.mark.parametrize("name", ["a.bias", "b.weight", "depthwise.bias"])
def test_one_value_that_is_left_is_not_silent(made, name):
    model, groups, _ = made
    silence(model, groups["a"], DEAD)
    tensor = model.get_parameter(name)
    axis = 1 if name == "b.weight" else 0
    tensor.data.narrow(axis, 4, 1)[..., -1:] = 1e-20
    assert silent_channels(model, groups["a"]).nonzero()[0].tolist() == [1]
