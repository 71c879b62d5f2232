import pytest
import torch
from helpers.networks import Concat, Residual, Row, init_norms, params, zero_gates
from helpers.zoo import ZOO
from torch import nn

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


@pytest.mark.parametrize(("exact", "left", "carriers"), [(False, 5, 0), (True, 6, 1)])
def test_channels_of_a_padded_reader(exact, left, carriers):
    model, example, groups = padded()
    small, report = slim(model, extract(model, groups), example, groups=groups, exact=exact)
    assert (small.conv1.out_channels, report.carriers, report.given_back) == (left, carriers, 0)
    assert report.passed and report.max_abs_diff < 1e-12
    # Only at the border does the slim model differ from the dense one.
    with torch.no_grad():
        gap = (model(example) - small(example)).abs()
    assert gap[..., 1:-1, 1:-1].max() < 1e-5 and (gap.max() > 1e-2) != exact
    assert report.drift == pytest.approx(float(gap.max()), rel=1e-3, abs=1e-5)
    assert report.drift_mean == pytest.approx(float(gap.mean()), rel=1e-3, abs=1e-5)
    assert report.output_size == pytest.approx(float(model(example).detach().abs().max()), rel=1e-3)
    assert report.to_json()["drift"] == report.drift and f"at most {report.drift:.2g}" in report.describe_drift()


def test_means_replace_channels_that_are_not_constant():
    """The mean over data and positions of what the reader sees, here on the output of a linear model."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.out(self.bn(self.conv(x)))

    model = Linear()
    example = init_norms(model)
    groups = find_groups(model, example)
    small, report = slim(model, make_plan(model, groups, {"conv": [1, 4]}), example, groups=groups)
    assert report.passed and report.folded == 2 and report.drift > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(example).mean((0, 2, 3)), small(example).mean((0, 2, 3)))


@pytest.mark.parametrize("network", [Row, lambda: Row(padding=1), Residual, Concat, ZOO["mobilenet_v3"]])
@pytest.mark.parametrize("exact", [False, True])
def test_channels_that_emit_zero_are_cut_without_drift(network, exact):
    model = network()
    example = init_norms(model)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.4)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.bias[norm.weight == 0] = 0
    small, report = slim(model, extract(model, groups), example, groups=groups, exact=exact)
    assert params(small) < params(model) and report.drift < 1e-12
    assert (report.folded, report.carriers, report.given_back, report.plan.added_bias) == (0, 0, 0, [])


@pytest.mark.parametrize(("beta", "given"), [(-1.0, 0), (1.0, 1)])
def test_dead_gate_before_a_padded_depthwise_convolution(beta, given):
    """After ReLU a negative β is zero, from which the later norm makes a constant. A positive one leaves the depthwise
    convolution with a border, which only the channel itself can produce; else its mean replaces it."""
    model = Row()
    example = init_norms(model)
    with torch.no_grad():
        model.bn1.weight[3], model.bn1.bias[3] = 0, beta
    groups = find_groups(model, example)
    plan = extract(model, groups)
    small, report = slim(model, plan, example, groups=groups, exact=True)
    assert report.given_back == given and small.conv1.out_channels == 7 + given
    other = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    cut, by_mean = slim(model, plan, example, groups=groups)
    assert cut.conv1.out_channels == 7 and by_mean.given_back == 0 and (by_mean.drift > 1e-6) == bool(given)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(other), small.double()(other), rtol=0, atol=1e-6)


def test_transposed_convolution_takes_the_mean_over_positions_or_a_carrier():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    example = init_norms(model)
    with torch.no_grad():
        model[1].weight[:3], model[1].bias[:3] = 0, torch.tensor([1.0, 2.0, -1.0])
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups, exact=True)
    assert equivalence.carriers == 1 and equivalence.given_back == 0 and equivalence.max_abs_diff < 1e-12
    assert (small[3].in_channels, small[3].weight.shape[:2]) == (4, (4, 4))
    cut, report = slim(model, extract(model, groups), example, groups=groups)
    assert cut[3].in_channels == 3 and report.passed and report.max_abs_diff < 1e-12
    with torch.no_grad():  # the kernel covers a different number of inputs at each position: on average the same
        dense, small = (part[:4](torch.randn(1, 3, 64, 64, generator=torch.manual_seed(0))) for part in (model, cut))
        before, after = model[4](dense), cut[4](small)
    torch.testing.assert_close(
        before[..., 2:-2, 2:-2].mean((2, 3)), after[..., 2:-2, 2:-2].mean((2, 3)), atol=0.02, rtol=0
    )


def test_squeeze_excite_makes_a_constant_vary():
    """A dead channel whose constant is scaled by a squeeze-excite varies: it is replaced by its mean, or kept."""

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
        model.down.bias.fill_(1)  # open, so that the weights depend on the image
        model.bn.weight[[1, 4]] = 0
        model.bn.bias[[1, 4]] = torch.tensor([0.0, 1.0])
    groups = find_groups(model, example)
    small, report = slim(model, extract(model, groups), example, groups=groups, exact=True)
    assert report.passed and report.given_back == 1 and report.plan.groups["conv"] == [0, 2, 3, 4, 5]
    assert (small.up.out_features, small.down.in_features, small.out.in_channels) == (5, 5, 5)
    assert list(report.inexact) == ["out"] and report.inexact["out"] > 0.01
    assert "1 dead channels stay" in report.plan.notes[-1] and report.drift < 1e-12
    small, report = slim(model, extract(model, groups), example, groups=groups)
    assert report.passed and report.given_back == 0 and report.plan.groups["conv"] == [0, 2, 3, 5]
    assert 1e-12 < report.drift < 0.1 and (small.up.out_features, small.down.in_features) == (4, 4)


@pytest.mark.parametrize(("exact", "left"), [(False, 0), (True, 1)])
def test_constant_of_a_removed_reader(exact, left):
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
    _, equivalence = slim(model, make_plan(model, groups, {coarse.id: range(4)}), example, exact=exact)
    assert equivalence.passed and equivalence.given_back == left and equivalence.max_abs_diff < 1e-12
    assert equivalence.plan.splits["b"] == [4, left] and (equivalence.drift < 1e-12) == exact


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
