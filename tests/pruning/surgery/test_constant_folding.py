import pytest
import torch
from helpers.networks import Row, init_norms, params
from torch import nn

from prunekit.errors import PlanError
from prunekit.layers.octavize import octavize
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim

DEAD = {1: 2.0, 4: 3.0, 6: 0.0}  # channel → β


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def padded():
    """A reader that pads with zeros, and three dead channels with different constants."""
    model = Row(padding=1)
    example = init_norms(model)
    with torch.no_grad():
        for channel, beta in DEAD.items():
            model.bn2.weight[channel], model.bn2.bias[channel] = 0, beta
    return model, example, find_groups(model, example)


@pytest.mark.parametrize(
    ("constants", "left", "carriers", "given"),
    [("carrier", 6, 1, 0), ("fold", 7, 0, 2), ("keep", 7, 0, 2), ("drop", 5, 0, 0)],
)
def test_channels_kept_for_each_option(constants, left, carriers, given):
    model, example, groups = padded()
    small, equivalence = slim(model, extract(model, groups), example, groups=groups, constants=constants)
    assert (small.conv1.out_channels, equivalence.carriers, equivalence.given_back) == (left, carriers, given)
    assert equivalence.passed == (constants != "drop")
    if constants != "drop":
        assert equivalence.max_abs_diff < 1e-12


def test_dropped_constants_are_reported_with_their_size():
    model, example, groups = padded()
    _, equivalence = slim(model, extract(model, groups), example, groups=groups, constants="drop")
    silu = nn.functional.silu(torch.tensor([2.0, 3.0, 0.0]))
    moved = (model.conv2.weight.detach()[:, list(DEAD)].sum((2, 3)) @ silu).abs().max()
    assert equivalence.inexact == pytest.approx({"conv2": float(moved)}, rel=1e-4)
    assert "conv2 by up to" in equivalence.plan.notes[-1] and "dropped" in equivalence.plan.notes[-1]
    assert equivalence.max_abs_diff > equivalence.tolerance and "differ" in equivalence.reason
    assert equivalence.to_json()["inexact"] == equivalence.inexact


def test_given_back_channels_are_reported_with_their_size():
    model, example, groups = padded()
    _, equivalence = slim(model, extract(model, groups), example, groups=groups, constants="fold")
    assert list(equivalence.inexact) == ["conv2"] and equivalence.inexact["conv2"] > 0.1
    assert "2 dead channels stay" in equivalence.plan.notes[-1]


def test_unknown_option_is_rejected():
    model, example, groups = padded()
    with pytest.raises(PlanError, match="carrier, fold, keep, drop"):
        slim(model, extract(model, groups), example, constants="carriers")


@pytest.mark.parametrize(("beta", "given"), [(-1.0, 0), (1.0, 1)])
def test_dead_gate_before_a_padded_depthwise_convolution(beta, given):
    """After ReLU a negative β is zero, from which the later norm makes a constant. A positive one leaves the depthwise
    convolution with a border, which only the channel itself can produce."""
    model = Row()
    example = init_norms(model)
    with torch.no_grad():
        model.bn1.weight[3], model.bn1.bias[3] = 0, beta
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    assert equivalence.given_back == given and small.conv1.out_channels == 7 + given
    other = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(other), small.double()(other), rtol=0, atol=1e-6)


def test_transposed_convolution_needs_a_carrier():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    example = init_norms(model)
    with torch.no_grad():
        model[1].weight[:3], model[1].bias[:3] = 0, torch.tensor([1.0, 2.0, -1.0])
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    assert equivalence.carriers == 1 and equivalence.given_back == 0 and equivalence.max_abs_diff < 1e-12
    assert (small[3].in_channels, small[3].weight.shape[:2]) == (4, (4, 4))


def test_squeeze_excite_makes_a_constant_vary():
    """A dead channel whose constant is scaled by a squeeze-excite varies, so it is kept."""

    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.down, self.up, self.out = nn.Linear(6, 3), nn.Linear(3, 6), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.bn(self.conv(x))
            weights = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
            return self.out(x * weights[:, :, None, None])

    model = Excite()
    example = init_norms(model)
    with torch.no_grad():
        model.bn.weight[[1, 4]] = 0
        model.bn.bias[[1, 4]] = torch.tensor([0.0, 1.0])
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    assert equivalence.passed and equivalence.given_back == 1 and equivalence.plan.groups["conv"] == [0, 2, 3, 4, 5]
    assert (small.up.out_features, small.down.in_features, small.out.in_channels) == (5, 5, 5)


@pytest.mark.parametrize(("constants", "left"), [("carrier", 1), ("fold", 1), ("keep", 4)])
def test_constant_of_a_removed_reader_keeps_a_channel(constants, left):
    """All channels of a branch are dead but emit a constant, and its reader would be removed."""

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
            self.bn, self.c, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.out(self.c(self.bn(self.b(self.a(x))).relu()))

    torch.manual_seed(0)
    model = octavize(Streams(), torch.zeros(2, 3, 16, 16))
    example = init_norms(model)
    groups = find_groups(model, example)
    (coarse,) = [group for group in groups if group.id == "b.mix.paths.0to1"]
    with torch.no_grad():
        for gate in coarse.gates:
            model.get_submodule(gate.norm).weight.zero_()
            model.get_submodule(gate.norm).bias.fill_(1)
    _, equivalence = slim(model, make_plan(model, groups, {coarse.id: range(4)}), example, constants=constants)
    assert equivalence.passed and equivalence.given_back == left and equivalence.max_abs_diff < 1e-12
    assert equivalence.plan.splits["b"] == [4, left]


def test_modes_and_requires_grad_are_kept():
    model, example, groups = padded()
    model.train()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    assert small.training and small.conv2.training and not small.bn1.training
    assert not small.conv2.weight.requires_grad and small.conv1.weight.requires_grad
    assert model.bn1.weight.requires_grad and params(model) > params(small)
    assert all(p.grad is None for p in model.parameters())


def test_model_that_reads_values_is_traced_with_values():
    class Looks(Row):
        def forward(self, x):
            return super().forward(x) if x.sum().item() == x.sum().item() else x

    model = Looks()
    example = init_norms(model)
    with torch.no_grad():
        model.bn1.weight[2] = model.bn2.weight[2] = 0
    groups = find_groups(model, example)
    assert [g.model_dump() for g in groups] == [g.model_dump() for g in find_groups(Row(), example)]
    assert slim(model, extract(model, groups), example)[0].conv1.out_channels == 7
