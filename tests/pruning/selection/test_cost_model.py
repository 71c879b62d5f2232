import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.marks import seeds
from helpers.networks import Concat, Residual, Row, csnet_with_dead_gates, init_norms, small_csnet, zero_gates
from helpers.zoo_products import PRODUCTS, Transposed, example_of
from torch import nn

from prunekit.errors import PlanError
from prunekit.flops import count, count_modules, total
from prunekit.layers import OptionalModules
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.cost_model import ModelSize, SizeModel
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.plan_builder import dead_channels, make_plan
from prunekit.pruning.surgery.slim import apply_plan


class Flat(nn.Module):
    """A flatten without a pooling, a norm with nothing to learn, a bias, and one PReLU for all channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.act = nn.PReLU()
        self.hidden = nn.Linear(6 * 15 * 15, 7)
        self.norm = nn.BatchNorm1d(7)
        self.out = nn.Linear(7, 2)

    def forward(self, x):
        x = self.act(self.plain(self.bn(self.conv(x))))
        return self.out(F.relu(self.norm(self.hidden(x.flatten(1)))))


class Dense(nn.Module):
    """Each layer reads all that came before it."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3 + 4 * k) for k in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(3 + 4 * k, 4, 3, padding=1, bias=False) for k in range(4)])
        self.last = nn.BatchNorm2d(19)
        self.out = nn.Conv2d(19, 2, 1)

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.out(F.relu(self.last(x)))


class Up(nn.Module):
    """A transposed convolution and one of two groups; they may or may not be cut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.halves = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.bn3 = nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        x = F.relu(self.bn2(self.halves(F.relu(self.bn1(self.stem(x))))))
        return self.out(F.relu(self.bn3(self.up(x))))


class Paths(nn.Module):
    """Two branches that meet in a sum; each path into it has a bias, and goes with the branch that it reads."""

    def __init__(self):
        super().__init__()
        self.stems = OptionalModules({k: nn.Conv2d(3, 5, 1, bias=False) for k in "ab"})
        self.norms = OptionalModules({k: nn.BatchNorm2d(5) for k in "ab"})
        self.joins = OptionalModules({k: nn.Conv2d(5, 6, 1) for k in "ab"})
        self.bn = nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        sides = [self.joins[k](F.relu(self.norms[k](self.stems[k](x)))) for k in self.stems]
        return self.out(F.relu(self.bn(sum(sides[1:], sides[0]))))


def real(model, shape):
    counts, _ = count_modules(model, shape)
    found = total(counts)
    return ModelSize(found["params"], found["macs"])


@pytest.mark.parametrize("seed", seeds(8, plain=3))
def test_csnet_with_dead_branches(seed):
    model, groups, example = csnet_with_dead_gates(seed, share=0.1 * seed, whole=0.1 * (seed % 4))
    shape = tuple(example.shape[1:])
    sizes = SizeModel(model, groups, shape)
    assert sizes.dense == real(model, shape)
    plan = extract(model, groups)
    made = apply_plan(small_csnet(), plan, example)
    assert sizes.size_without(dead_channels(groups, plan)) == real(made, shape)
    if seed:
        assert sizes.size_without(dead_channels(groups, plan)).params < sizes.dense.params


def test_modules_without_producers_or_readers_are_removed():
    """Branches are killed whole, so that others are left without makers or readers."""
    torch.manual_seed(0)
    model = small_csnet()
    groups = find_groups(model, torch.zeros(1, 3, 32, 32))
    sizes, cutter = SizeModel(model, groups, (3, 32, 32)), Cutter(model, groups)
    free = [group for group in groups if group.reason is None]
    starved = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        given = {g.id: set(range(g.channels)) for g in free if draw.random() < 0.25}
        given |= {g.id: {0} for g in free if g.id not in given and draw.random() < 0.5}
        settled, _ = cutter.complete(given)
        starved += settled != given
        assert sizes.size_without(given) == sizes.size_without(settled)
        assert sizes.size_without({name: len(gone) for name, gone in given.items()}) == sizes.size_without(given)
    assert starved > 5


@pytest.mark.filterwarnings("ignore::prunekit.PrunekitWarning")
@pytest.mark.parametrize("network", [Row, Residual, Concat, lambda: Row(padding=1), Flat, Dense, Up])
@pytest.mark.parametrize("seed", seeds(5, plain=2))
def test_other_networks(network, seed):
    torch.manual_seed(seed)
    model = network()
    example = init_norms(model, seed)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.2 * seed, seed)
    plan = extract(model, groups)
    sizes = SizeModel(model, groups, (3, 32, 32))
    assert sizes.dense == real(model, (3, 32, 32))
    made = apply_plan(network(), plan, example)
    assert sizes.size_without(dead_channels(groups, plan)) == real(made, (3, 32, 32))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("seed", seeds(6, plain=2))
def test_products_of_activations_and_bare_parameters(name, seed):
    torch.manual_seed(seed)
    model, example, rng = PRODUCTS[name]().eval(), example_of(name), np.random.default_rng(seed)
    groups = find_groups(model, example)
    sizes = SizeModel(model, groups, example)
    dead = {}
    for group in groups:
        if group.reason is None:
            lost = min(int(rng.binomial(group.channels, 0.3)), group.channels - 1)
            dead[group.id] = set(rng.permutation(group.channels)[:lost].tolist())
    plan = make_plan(model, groups, dead)
    small = apply_plan(PRODUCTS[name]().eval(), plan, example)
    for one, found in ((model, sizes.dense), (small, sizes.size_without(dead_channels(groups, plan)))):
        cost = count(one, example)
        assert found == ModelSize(cost.params, cost.macs)
    assert found.macs < sizes.dense.macs


def test_inputs_and_outputs_of_a_convolution_with_groups():
    model = Up()
    groups = find_groups(model, init_norms(model))
    plan = make_plan(model, groups, {"stem": {0, 1, 4, 6}, "halves": {0, 7}, "up": {2}})
    made = apply_plan(Up(), plan, torch.zeros(1, 3, 32, 32))
    assert made.halves.weight.shape[:2] == (10, 2)
    size = SizeModel(model, groups, (3, 32, 32)).size_without(dead_channels(groups, plan))
    assert size == real(made, (3, 32, 32))


def test_products_at_another_size_than_that_of_the_groups():
    model, shape = Transposed(), (3, 36, 36)
    groups = find_groups(model, torch.randn(4, 3, 32, 32))
    plan = make_plan(model, groups, {"conv": {0, 3}, "up1": {1, 2, 5}})
    sizes = SizeModel(model, groups, shape)
    small = apply_plan(Transposed(), plan, torch.randn(1, 3, 32, 32))
    assert sizes.dense == real(model, shape) != real(model, (3, 32, 32))
    assert sizes.size_without(dead_channels(groups, plan)) == real(small, shape)


def test_removed_module_loses_its_bias():
    model = Paths()
    groups = find_groups(model, init_norms(model))
    plan = make_plan(model, groups, {"stems.a": range(5), "joins.a": {0}})
    assert plan.removed == ["joins.a", "norms.a", "stems.a"]
    size = SizeModel(model, groups, (3, 32, 32)).size_without(dead_channels(groups, plan))
    assert size == real(apply_plan(Paths(), plan, torch.zeros(1, 3, 32, 32)), (3, 32, 32))


def test_sizes_agree_with_hand_counts():
    model = Flat()
    groups = find_groups(model, init_norms(model))
    size = SizeModel(model, groups, (3, 32, 32)).size_without({"conv": [1, 4], "hidden": 3})
    # By hand: 4 of 6 channels at 15×15 positions, 4 of 7 hidden units.
    assert size.macs == 15 * 15 * 4 * 27 + 4 * 15 * 15 * 4 + 4 * 2
    assert size.params == 4 * 28 + 4 * 2 + 1 + (4 * 225 * 4 + 4) + 4 * 2 + (4 * 2 + 2)


@pytest.mark.parametrize("network", [Row, Residual, Concat, Flat, Dense])
@pytest.mark.parametrize("measure", ["params", "macs"])
def test_scores_per_cost(network, measure):
    torch.manual_seed(0)
    model = network()
    example = init_norms(model, 0)
    groups = [group for group in find_groups(model, example) if group.reason is None]
    sizes, draw = SizeModel(model, groups, (3, 32, 32)), np.random.default_rng(0)
    scores = {group.id: draw.random(group.channels) for group in groups}
    found = {power: sizes.per_cost(scores, measure, power) for power in (0, 0.5, 1)}
    dense = getattr(real(model, (3, 32, 32)), measure)
    for group in groups:
        cut = apply_plan(network(), make_plan(model, groups, {group.id: {0}}), example)
        share = 1 - getattr(real(cut, (3, 32, 32)), measure) / dense
        for power, divided in found.items():
            np.testing.assert_allclose(divided[group.id], scores[group.id] / share**power)


@pytest.mark.parametrize(
    "score, power, words",
    [(-1, 1, "a score of .* is negative"), (1, -1, "cost_power=-1: must be a number of at least 0")],
)
def test_scores_per_cost_must_not_be_negative(score, power, words):
    model = Row()
    groups = [group for group in find_groups(model, init_norms(model, 0)) if group.reason is None]
    with pytest.raises(PlanError, match=words):
        scores = {group.id: np.full(group.channels, score) for group in groups}
        SizeModel(model, groups, (3, 32, 32)).per_cost(scores, "macs", power)
