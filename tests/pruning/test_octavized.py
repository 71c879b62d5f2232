"""Groups, decay, plans and slimming of octavized networks."""

import pytest
import torch
import torch.nn.functional as F
from helpers.marks import seeds, slow
from helpers.networks import init_norms, params, zero_gates
from helpers.octave_networks import NETWORKS, PreActivation, Residual

import prunekit
from prunekit.backbones.octresnet import octresnet
from prunekit.layers.octavize import octavize
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import apply_plan, slim

EXAMPLE = torch.zeros(2, 3, 20, 20)
SPLITS = ([0.5, 0.5], [0.25, 0.75], [0.4, 0.3, 0.3], [1, 0])
pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def small_octresnet(split=(0.5, 0.5)):
    return octresnet(8, 8, 10, split)


def build(name, split):
    return octavize(NETWORKS[name](), EXAMPLE, split)


def initialized(model, seed=0):
    """Initialize the norms and return a batch."""
    return init_norms(model, seed, 20, beta=0.2)


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_random_dead_gates_and_branches_slim_with_equivalence_check(name, seed):
    torch.manual_seed(seed)
    split = SPLITS[(seed + list(NETWORKS).index(name)) % len(SPLITS)]
    model = build(name, split)
    example = initialized(model, seed)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.6 if name == "PreActivation" else 0.35, seed, whole=0.4)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups, exact=True)
    assert equivalence.passed and len(equivalence.inputs) >= 2 and params(small) < params(model)
    # The plan, as JSON, and the builder are all that it takes.
    again = apply_plan(build(name, split), prunekit.Plan.from_json(equivalence.plan.to_json()), example)
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        for size in ((20, 20), (13, 18)):
            x = torch.randn(2, 3, *size)
            assert torch.equal(again.eval()(x), small.eval()(x))


def silence(model, groups, *ids):
    """Slim the model without any channel of these groups."""
    with torch.no_grad():
        for group in groups:
            for gate in group.gates if group.id in ids else ():
                model.get_submodule(gate.norm).weight[slice(*gate.slice)] = 0
                model.get_submodule(gate.norm).bias[slice(*gate.slice)] = 0


def without(model, example, *ids):
    groups = find_groups(model, example)
    silence(model, groups, *ids)
    dead = {group.id: range(group.channels) for group in groups if group.id in ids}
    assert len(dead) == len(ids)
    return slim(model, make_plan(model, groups, dead), example, groups=groups, exact=True)


SIZES = ((20, 20), (9, 11), (13, 6), (2, 3), (1, 1))


def agrees(model, small, groups_off):
    """Compare on inputs and sizes other than those of the equivalence check."""
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(small.eval()(x), groups_off.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer, branch",
    [
        *(("conv", 0), slow("conv", 1), slow("stage1.0.conv1", 0), slow("stage2.0.conv2", 0), ("stage2.0.conv2", 1)),
        *(slow("stage3.0.conv1", 1), ("stage3.0.conv2", 0), slow("stage3.0.conv2", 1)),
    ],
)
def test_any_branch_of_any_layer_can_be_removed(layer, branch):
    """In the stem, in a block, in a residual stream and before the head; for odd and even sizes."""
    torch.manual_seed(3)
    model = small_octresnet()
    example = initialized(model)
    small, equivalence = without(model, example, f"{layer}.mix.paths.0to{branch}")
    agrees(model, small, model)
    assert equivalence.passed and equivalence.carriers == 0
    assert equivalence.plan.splits[layer][branch] == 0 and equivalence.plan.splits[layer][1 - branch] > 0
    here = small.get_submodule(layer)
    assert list(here.norms) == [str(1 - branch)] and not any(key.endswith(f"to{branch}") for key in here.mix.paths)
    if layer == "stage3.0.conv2":
        assert small.classifier.in_features == 16
    # And on from there.
    groups = find_groups(small, example)
    zero_gates(small, groups, 0.3, seed=1)
    smaller, equivalence = slim(small, extract(small, groups), example, groups=groups, exact=True)
    assert equivalence.passed and params(smaller) < params(small)


def test_block_can_lose_all_channels():
    """What remains is the constant of its last norm, which is still added."""
    model = small_octresnet()
    example = initialized(model)
    small, equivalence = without(model, example, "stage1.0.conv1.mix.paths.0to0", "stage1.0.conv1.mix.paths.0to1")
    assert equivalence.passed and equivalence.plan.splits["stage1.0.conv1"] == [0, 0]
    assert not len(small.get_submodule("stage1.0.conv2").mix.paths)
    agrees(model, small, model)


def test_remove_a_branch_of_a_preactivation_network():
    torch.manual_seed(0)
    model = octavize(PreActivation(), EXAMPLE)
    example = initialized(model)
    small, equivalence = without(model, example, "stem.mix.paths.0to1")
    agrees(model, small, model)
    assert equivalence.plan.splits == {name: [6, 0] for name in ("stem", "convs.0", "convs.1")}
    assert small.out.in_channels == 6


def test_splits_are_in_the_order_of_the_model():
    model = small_octresnet([0.25, 0.75])
    example = initialized(model)
    plan = make_plan(model, find_groups(model, example), {})
    widths = {"conv": 8, "stage1.0.conv1": 8, "stage1.0.conv2": 8}
    widths |= {f"stage2.0.{layer}": 16 for layer in ("conv1", "conv2", "shortcut.0")}
    widths |= {f"stage3.0.{layer}": 32 for layer in ("conv1", "conv2", "shortcut.0")}
    assert list(plan.splits) == model.octave_layers == list(widths)
    assert plan.splits == {layer: [n // 4, 3 * n // 4] for layer, n in widths.items()}


def test_decay_uses_the_output_of_the_activation():
    torch.manual_seed(0)
    model = octavize(Residual(), EXAMPLE)
    groups = find_groups(model, EXAMPLE)
    gates = {gate.norm: gate.activation for group in groups for gate in group.gates}
    assert gates["stem.norms.0"] == gates["a1.0.norms.1"] == "relu" and gates["a2.0.norms.0"] is None
    assert gates["b1.0.norms.1"] == "b1.0.acts.1" and gates["b2.0.norms.0"] == "b2.0.acts.0"
    seen = {}
    for name in gates:
        model.get_submodule(name).register_forward_hook(lambda m, _, y, name=name: seen.update({name: y}))
    model.train()
    with DynamicWeightDecay(model, groups, weight=2.0) as decay:
        model(torch.randn(4, 3, 20, 20))
        wanted = 0
        for name, activation in gates.items():
            y = seen[name]
            act = F.relu if activation == "relu" else model.get_submodule(activation or "none") if activation else None
            y = y if act is None else act(y)
            wanted += (y.mean((2, 3)).abs().mean(0).detach() * model.get_submodule(name).weight ** 2).sum()
        torch.testing.assert_close(decay.penalty(), wanted)
