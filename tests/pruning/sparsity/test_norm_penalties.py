import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.marks import seeds
from helpers.networks import Concat, Row, init_norms
from helpers.zoo import ZOO
from torch import nn

from prunekit.config import registry
from prunekit.errors import TrainingError
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.pruning.sparsity.norm_penalties import GroupNormDecay, L1Decay
from prunekit.training.optimizers import adam, param_groups

NAMES = ["vgg", "resnet_basic", "resnext", "mobilenet_v2", "densenet", "unet_bilinear"]


def double(name, seed=0):
    torch.manual_seed(seed)
    model = ZOO[name]()
    groups = find_groups(model, torch.randn(2, 3, 32, 32))
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
    return model, groups


def gradients(model, decay):
    model.zero_grad()
    value = decay.penalty()
    value.backward()
    return float(value.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-13)


class ByHand:
    """A penalty that goes from channel to channel."""

    def __init__(self, model, groups, weight, of):
        self.model, self.weight, self.of = model, weight, of
        self.groups = [group for group in groups if group.reason is None]

    def penalty(self):
        return self.weight * sum(self.of(self.model, group, k) for group in self.groups for k in range(group.channels))


def gates_of(model, group, k):
    return sum(model.get_submodule(gate.norm).weight[gate.slice[0] + k].abs() for gate in group.gates)


def slices_of(model, group, k):
    squares, size = 0.0, 0
    for member in group.members:
        name, _, key = member.tensor.rpartition(".")
        module = model.get_submodule(name)
        if key != "weight" or isinstance(module, nn.PReLU):
            continue
        places = torch.arange(member.offset + k * member.stride, member.offset + (k + 1) * member.stride)
        weight = module.weight
        if member.axis == 1 and getattr(module, "groups", 1) > 1:
            block, places = int(places[0]) // weight.shape[1], places % weight.shape[1]
            height = len(weight) // module.groups
            weight = weight[block * height : (block + 1) * height]
        part = weight.index_select(member.axis, places)
        squares, size = squares + part.square().sum(), size + part.numel()
    return size**0.5 * squares.sqrt()


@pytest.mark.parametrize("name", NAMES)
def test_l1_and_its_gradient_equal_a_loop(name):
    model, groups = double(name)
    same(gradients(model, L1Decay(model, groups, 0.3)), gradients(model, ByHand(model, groups, 0.3, gates_of)))


@pytest.mark.parametrize("name", NAMES)
def test_group_norm_and_its_gradient_equal_a_loop(name):
    model, groups = double(name)
    same(gradients(model, GroupNormDecay(model, groups, 0.3)), gradients(model, ByHand(model, groups, 0.3, slices_of)))


@pytest.mark.parametrize("decay", ["l1", "group_norm"])
@pytest.mark.parametrize("seed", seeds(3))
def test_both_are_norms(decay, seed):
    """Of degree one in the weights, indifferent to signs, and linear in λ, also where λ is changed on the way."""
    model, groups = double("resnet_basic", seed)
    penalty = registry.decays.get(decay)(model, groups, 0.1)
    value = float(penalty.penalty().detach())
    penalty.weight = 0.4
    assert float(penalty.penalty().detach()) == pytest.approx(4 * value)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= -2
    assert float(penalty.penalty().detach()) == pytest.approx(8 * value)


def test_group_norm_does_not_depend_on_the_order_of_channels():
    model = Row()
    groups = find_groups(model, torch.randn(1, 3, 16, 16))
    model.double()
    before = float(GroupNormDecay(model, groups, 1.0).penalty().detach())
    order = torch.randperm(8)
    with torch.no_grad():
        for name in ("conv1", "bn1", "depthwise", "bn2"):
            model.get_submodule(name).weight.copy_(model.get_submodule(name).weight[order])
        model.conv2.weight.copy_(model.conv2.weight[:, order])
    assert float(GroupNormDecay(model, groups, 1.0).penalty().detach()) == pytest.approx(before, rel=1e-12)
    with torch.no_grad():
        model.bn1.weight.copy_(model.bn1.weight[order] * 2)
    assert float(GroupNormDecay(model, groups, 1.0).penalty().detach()) != pytest.approx(before, rel=1e-6)


def test_channel_of_zeros_has_zero_gradient():
    model, groups = double("resnet_basic")
    first = next(group for group in groups if group.reason is None)
    with torch.no_grad():
        for member in first.members:
            name, _, key = member.tensor.rpartition(".")
            getattr(model.get_submodule(name), key).index_fill_(member.axis, torch.tensor([member.offset]), 0.0)
    value, found = gradients(model, GroupNormDecay(model, groups, 0.3))
    assert np.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in found.values())
    assert not found[f"{first.producers[0]}.weight"][0].any()


@pytest.mark.parametrize("decay", ["l1", "group_norm"])
def test_excluded_modules_are_not_decayed(decay):
    model, groups = double("resnet_basic")
    build = registry.decays.get(decay)
    kept = build(model, groups, 0.3, exclude=["layers.0.*"])
    _, found = gradients(model, kept)
    assert set(build(model, groups, 0.3).norms) - set(kept.norms) >= {"layers.0.0.bn1", "layers.0.1.bn1"}
    assert not any(name.startswith("layers.0.") for name in kept.norms)
    assert "layers.0.0.bn1.weight" not in found and "layers.1.1.bn1.weight" in found
    with pytest.raises(TrainingError, match="to decay: every"):
        build(model, groups, exclude=["*"])
    with pytest.raises(TrainingError, match="to decay: every"):
        build(model, [group for group in groups if group.reason])


@pytest.mark.parametrize("decay", ["l1", "group_norm"])
def test_only_prunable_channels_are_decayed(decay):
    """A norm over both: its gates of a group that cannot be pruned stay as they are."""
    model = Row()
    groups = find_groups(model, torch.randn(1, 3, 16, 16))
    next(group for group in groups if group.id == "conv2").reason = "the test's"
    _, found = gradients(model, registry.decays.get(decay)(model, groups, 1.0))
    assert "bn3.weight" not in found and "bn1.weight" in found


@pytest.mark.parametrize("decay", ["l1", "group_norm"])
def test_norm_over_two_groups_decays_only_the_prunable_one(decay):
    model = Concat()
    groups = find_groups(model, torch.randn(1, 3, 16, 16))
    next(group for group in groups if group.id == "b").reason = "the test's"
    penalty = registry.decays.get(decay)(model, groups, 1.0)
    _, found = gradients(model, penalty)
    assert found["bn.weight"][:5].all() and not found["bn.weight"][5:].any() and penalty.norms == ("bn",)


@pytest.mark.parametrize("decay", ["l1", "group_norm"])
def test_optimizer_weight_decay_skips_the_gates(decay):
    model = Row()
    groups = find_groups(model, torch.randn(1, 3, 16, 16))
    penalty = registry.decays.get(decay)(model, groups, 1.0)
    assert set(penalty.norms) == {"bn1", "bn2", "bn3"}
    for share in param_groups(model, 1e-3, None, penalty.norms):
        gates = [any(p is model.get_submodule(name).weight for name in penalty.norms) for p in share.params]
        assert all(gates) != share.weight_decay and all(gates) == any(gates)


def trained(name, weight, steps=300):
    """The scores of a small network's channels after training."""
    torch.manual_seed(1)
    model, x = Row(padding=1).train(), torch.randn(16, 3, 8, 8)
    y = (x[:, :1] + x[:, 1:2] > 0).float()
    groups = find_groups(model, x)
    decay = registry.decays.get(name)(model, groups, weight)
    optimizer = adam(param_groups(model, 1e-2, 2e-2, decay.norms))
    rates = [group["lr"] for group in optimizer.param_groups]
    with decay:
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            loss = F.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            (loss + decay.penalty()).backward()
            optimizer.step()
    return loss.item(), np.concatenate([gate_scores(model, group) for group in groups if group.reason is None])


@pytest.mark.slow
def test_each_decay_prunes_channels_and_learns_the_task():
    _, free = trained("none", 0.0)
    assert (free > 0.05).all()
    for name, weight in (("dynamic", 5.0), ("l1", 0.1), ("group_norm", 0.01)):
        loss, values = trained(name, weight)
        assert 1 <= (values > 0.05).sum() < len(free), name
        assert loss < 0.5, name  # chance: 0.69


def test_dynamic_and_l1_drive_the_same_gates():
    model = Row()
    init_norms(model)
    groups = find_groups(model, torch.randn(1, 3, 16, 16))
    assert L1Decay(model, groups).norms == DynamicWeightDecay(model, groups).norms
