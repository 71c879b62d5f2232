import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Row, csnet_with_dead_gates, small_csnet
from torch import nn

from prunekit.errors import TrainingError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay


class Two(nn.Module):
    """A norm with a PReLU module, and one with a functional ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a, self.act = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4)
        self.b, self.norm_b = nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.out = nn.Conv2d(2, 1, 1)

    def parts(self, x):
        y = self.act(self.norm_a(self.a(x)))
        z = F.relu(self.norm_b(self.b(y)))
        return y, z

    def forward(self, x):
        return self.out(self.parts(x)[1])


@pytest.fixture
def two():
    torch.manual_seed(0)
    model = Two().train()
    groups = find_groups(model, torch.randn(2, 3, 6, 6))
    with torch.no_grad():
        for norm in (model.norm_a, model.norm_b):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    return model, groups


def by_hand(model, batches, weight):
    """λ·½·Σ mean over images of |spatial mean| · γ², the norms in train mode."""
    found = 0.0
    for norm, index in ((model.norm_a, 0), (model.norm_b, 1)):
        responses = torch.cat([model.parts(x)[index].mean((2, 3)).abs() for x in batches]).mean(0)
        found += 0.5 * weight * float((responses * norm.weight**2).sum())
    return found


def test_penalty_equals_hand_computed_value(two):
    model, groups = two
    x = torch.randn(5, 3, 6, 6)
    with DynamicWeightDecay(model, groups, 0.3) as decay:
        model(x)
        assert decay.penalty().item() == pytest.approx(by_hand(model, [x], 0.3), rel=1e-5)


def test_responses_are_averaged_over_the_images_of_all_forwards(two):
    model, groups = two
    batches = [torch.randn(2, 3, 6, 6), 3 * torch.randn(6, 3, 6, 6)]
    with DynamicWeightDecay(model, groups, 0.3) as decay:
        for x in batches:
            model(x)
        assert decay.penalty().item() == pytest.approx(by_hand(model, batches, 0.3), rel=1e-5)


def test_gradient_reaches_only_the_gates(two):
    model, groups = two
    with DynamicWeightDecay(model, groups, 0.3) as decay:
        model(torch.randn(4, 3, 6, 6))
        decay.penalty().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"norm_a.weight", "norm_b.weight"}


def test_penalty_without_a_forward_is_refused(two):
    model, groups = two
    with DynamicWeightDecay(model, groups, 0.3) as decay:
        with pytest.raises(TrainingError, match="needs a forward"):
            decay.penalty()
        model(torch.randn(2, 3, 6, 6))
        decay.penalty()
        with pytest.raises(TrainingError, match="needs a forward"):
            decay.penalty()
        model.eval()(torch.randn(2, 3, 6, 6))
        with pytest.raises(TrainingError, match="needs a forward"):
            decay.penalty()


def test_hooks_exist_only_inside_with(two):
    model, groups = two
    decay = DynamicWeightDecay(model, groups, 0.3)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError), decay:
        assert sum(len(m._forward_hooks) for m in model.modules()) == 2
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())
    model(torch.randn(2, 3, 6, 6))
    with pytest.raises(TrainingError, match="outside of `with`"):
        decay.penalty()


def test_copies_of_the_model_are_ignored(two):
    model, groups = two
    x = torch.randn(2, 3, 6, 6)
    with DynamicWeightDecay(model, groups, 0.3) as decay:
        teacher = copy.deepcopy(model)
        teacher(100 * torch.randn(2, 3, 6, 6))
        model(x)
        teacher(100 * torch.randn(2, 3, 6, 6))
        assert decay.penalty().item() == pytest.approx(by_hand(model, [x], 0.3), rel=1e-5)


def test_excluded_norms_are_not_decayed():
    model = small_csnet()
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    assert len(DynamicWeightDecay(model, groups).norms) == 58
    blocks = DynamicWeightDecay(model, groups, exclude=["head.*"]).norms
    assert len(blocks) == 51 and not any(name.startswith("head") for name in blocks)
    with pytest.raises(TrainingError, match="no gate to decay"):
        DynamicWeightDecay(model, groups, exclude=["*"])


def test_flops_weights_double_with_the_side_length():
    torch.manual_seed(0)
    model = small_csnet().train()
    groups = find_groups(model, torch.randn(1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    gradients = {}
    for kind in ("none", "flops"):
        model.zero_grad()
        with DynamicWeightDecay(model, groups, 1.0, branch_weights=kind) as decay:
            model(x)
            decay.penalty().backward()
        gradients[kind] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    weight = {name: float((gradients["flops"][name] / gradients["none"][name]).mean()) for name in gradients["none"]}
    fine, coarse = (weight[f"stage1.0.mix_out.norms.{b}.weight"] for b in (0, 1))
    later = weight["stage2.0.mix_out.norms.0.weight"]
    assert fine == pytest.approx(2 * coarse, rel=1e-4) and fine == pytest.approx(2 * later, rel=1e-4)


def test_serial_gates_and_functional_activations():
    model = Row()
    groups = find_groups(model, torch.randn(2, 3, 12, 12))
    activations = {gate.norm: gate.activation for group in groups for gate in group.gates}
    assert activations == {"bn1": "relu", "bn2": "silu", "bn3": "relu"}


def test_a_slim_model_can_be_decayed_again():
    model, groups, example = csnet_with_dead_gates(0)
    from prunekit.pruning.selection.extract import extract
    from prunekit.pruning.surgery.slim import slim

    small, _ = slim(model, extract(model, groups), example, groups=groups)
    with DynamicWeightDecay(small.train(), find_groups(small, example)) as decay:
        small(example)
        assert float(decay.penalty()) > 0


def test_model_without_norms_has_no_gate_to_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups = find_groups(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(TrainingError, match="no channel passes a norm with a gate; use the decay group_norm, or none"):
        DynamicWeightDecay(model, groups)
