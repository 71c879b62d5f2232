"""Every architecture of the zoo, slimmed with random dead gates and compared on inputs other than the check's."""

import numpy as np
import pytest
import torch
from helpers.left_out import leave_out
from helpers.marks import seeds
from helpers.networks import init_norms, params
from helpers.zoo import ZOO
from helpers.zoo_tokens import TOKENS

from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.silence import silence
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.slim import slim

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")

NETWORKS = {**ZOO, **TOKENS}
# Substrings of the reasons of the unprunable groups.
REASONS = {
    "googlenet_aux": {"path to the output", "in train mode only"},
    "mixer": {"what are not channels"},
    "shufflenet_v1": {"regrouped between convolutions with groups"},
    "transformer_encoder": {"passes select"},
    "vit": {"what are not channels", "passes unbind"},
}
# Networks with grouped convolutions, in which not all dead channels can be cut.
GROUPED = {"resnext", "shufflenet_v1", "style_transfer"}


def prepared(name, seed):
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    example = init_norms(model, seed)
    return model, example, find_groups(model, example)


def zero_some_gates(model, group, channels, rng):
    """Set as few gates to zero as these channels need to be dead, at random positions."""

    def close(part):
        if isinstance(part, int):
            gate = group.gates[part]
            model.get_submodule(gate.norm).weight[gate.slice[0] + torch.from_numpy(channels)] = 0
            return
        kind, parts = next(iter(part.items()))
        for one in [parts[rng.integers(len(parts))]] if kind == "serial" else parts:
            close(one)

    with torch.no_grad():
        close(group.combine)


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_random_dead_gates(name, seed):
    model, example, groups = prepared(name, seed)
    rng, dead = np.random.default_rng(seed), 0
    for group in groups:
        if group.reason is None:
            count = min(int(rng.binomial(group.channels, 0.15 + 0.15 * seed)), group.channels - 1)
            channels = np.sort(rng.permutation(group.channels)[:count])
            if group.gates:
                zero_some_gates(model, group, channels, rng)
            else:
                silence(model, group, channels)
            dead += count
    # No score is infinite, so that groups without gates compete.
    scores = {group.id: np.minimum(gate_scores(model, group), 1e9) for group in groups}
    small, equivalence = slim(
        model, extract(model, groups, scores=scores, threshold=1e-3), example, groups=groups, exact=True
    )
    assert equivalence.passed and equivalence.max_abs_diff <= equivalence.tolerance
    other = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64)
    with torch.no_grad():
        reference = leave_out(model, groups, dead_channels(groups, equivalence.plan))
        a, b = reference.double()(other), small.double()(other)
    assert (a - b).abs().max() <= 2e-6 * max(1, a.abs().max())
    assert params(small) < params(model)
    small.train()(other)  # auxiliary heads, too
    cut = sum(group.channels - len(equivalence.plan.kept(group)) for group in groups if group.reason is None)
    assert cut + equivalence.carriers + equivalence.given_back >= dead or name in GROUPED


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_unprunable_groups_have_the_expected_reasons(name):
    _, _, groups = prepared(name, 0)
    own = {"the model's input", "the model's output"}
    reasons = {group.reason for group in groups if group.reason} - own
    wanted = REASONS.get(name, set())
    assert all(any(part in reason for part in wanted) for reason in reasons), reasons
    assert all(any(part in reason for reason in reasons) for part in wanted), reasons
    assert sum(group.reason is None for group in groups) >= 1


@pytest.mark.parametrize(("first", "left"), [([0, 1, 2], 8), ([0, 2, 4, 6], 4), ([0, 2, 4, 6, 7], 4)])
def test_groups_of_a_convolution_stay_of_equal_size(first, left):
    """Eight channels in four groups: as many are cut in each group as are dead in all of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), torch.nn.BatchNorm2d(12), torch.nn.ReLU(),
        torch.nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    example = init_norms(model, 0)
    with torch.no_grad():
        model[1].weight[first], model[1].bias[first] = 0, -1
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    assert equivalence.passed and equivalence.carriers == 0
    assert small[3].in_channels == left and small[3].groups == 4 and small[3].out_channels == 12
    assert small[3].weight.shape == (12, left // 4, 3, 3)
