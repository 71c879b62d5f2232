import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from helpers.networks import Row, init_norms
from helpers.zoo import ZOO
from torch import nn

from prunekit.config import registry
from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.importance import ablation, check_finite, gate, magnitude, random, taylor


def settled(name, seed=0):
    torch.manual_seed(seed)
    model = ZOO[name]() if name in ZOO else Row(padding=1)
    example = init_norms(model, seed)
    return model.eval(), find_groups(model, example), example


def square(batch):
    return lambda model: [model(batch).square().mean()]


def theirs(model, groups, example, importance):
    """What torch-pruning gives for each of our groups: its own starts from the module that makes the channels."""
    graph = tp.DependencyGraph().build_dependency(model, example)
    model.zero_grad()
    model(example).square().mean().backward()
    found = {}
    for group in groups:
        if group.reason is None:
            maker = model.get_submodule(group.producers[0])
            cut = tp.prune_conv_out_channels if isinstance(maker, nn.Conv2d) else tp.prune_linear_out_channels
            members = graph.get_pruning_group(maker, cut, idxs=list(range(group.channels)))
            found[group.id] = importance(members).numpy()
    model.zero_grad()
    return found


# No depthwise kernels and no convolutions with groups: torch-pruning passes over the ones, and gives all blocks of the
# others the sum over all blocks.
@pytest.mark.parametrize("name", ["vgg", "resnet_basic", "resnet_bottleneck", "resnet_preactivation", "densenet"])
def test_magnitude_and_taylor_equal_torch_pruning(name):
    model, groups, example = settled(name)
    for importance, ours in (
        (tp.importance.GroupMagnitudeImportance(), magnitude(model, groups)),
        (
            tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None),
            magnitude(model, groups, p=1, reduction="sum", normalizer="none"),
        ),
        (
            tp.importance.GroupMagnitudeImportance(target_types=[nn.Conv2d, nn.Linear], normalizer="max"),
            magnitude(model, groups, norms=False, normalizer="max"),
        ),
        # Its Taylor looks for group norms where it means batch norms, and so passes over them.
        (tp.importance.GroupTaylorImportance(), taylor(model, groups, square(example), norms=False)),
    ):
        wanted = theirs(model, groups, example, importance)
        assert wanted.keys() == ours.keys() and len(ours) > 3
        for group, values in wanted.items():
            np.testing.assert_allclose(ours[group], values, rtol=1e-4, atol=1e-6)


def test_max_reduction_takes_the_largest_slice():
    model, groups, example = settled("resnet_basic")
    wanted = theirs(model, groups, example, tp.importance.GroupMagnitudeImportance(group_reduction="max"))
    for group, values in magnitude(model, groups, reduction="max").items():
        np.testing.assert_allclose(values, wanted[group], rtol=1e-4)


def by_hand(model, groups, figure, norms=True):
    """Mean over the slices of a channel, one channel after another."""
    found = {}
    for group in groups:
        if group.reason is not None:
            continue
        rows = []
        for member in group.members:
            name, _, key = member.tensor.rpartition(".")
            module = model.get_submodule(name)
            if key != "weight" or isinstance(module, nn.PReLU):
                continue
            if not norms and isinstance(module, nn.BatchNorm2d):
                continue
            value = figure(module.weight)
            blocks = getattr(module, "groups", 1) if member.axis else 1
            sums = []
            for k in range(group.channels):
                places = range(member.offset + k * member.stride, member.offset + (k + 1) * member.stride)
                total = 0.0
                for place in places:
                    if member.axis == 0:
                        total += float(value[place].sum())
                    else:
                        width, height = value.shape[1], value.shape[0] // blocks
                        block, column = divmod(place, width)
                        total += float(value[block * height : (block + 1) * height, column].sum())
                sums.append(total)
            rows.append(sums)
        mean = np.mean(rows, 0)
        found[group.id] = mean / mean.mean()
    return found


@pytest.mark.parametrize("name", ["row", "resnext", "mobilenet_v2", "unet_bilinear", "vgg"])
@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_equals_a_loop_over_channels(name, p):
    model, groups, _ = settled(name)
    wanted = by_hand(model, groups, lambda weight: weight.detach().double().abs() ** p)
    ours = magnitude(model, groups, p=p)
    assert wanted.keys() == ours.keys()
    for group, values in wanted.items():
        np.testing.assert_allclose(ours[group], values, rtol=1e-9)


def test_taylor_averages_over_batches():
    model, groups, example = settled("row")
    batches = [example[:2], 3 * example[2:]]

    def losses(model):
        for batch in batches:
            yield model(batch).square().mean()

    one = {}
    for batch in batches:
        model.zero_grad()
        model(batch).square().mean().backward()
        for group, values in by_hand(
            model, groups, lambda weight: (weight.detach() * weight.grad).double().abs()
        ).items():
            one.setdefault(group, []).append(values)
    model.zero_grad()
    raw = [taylor(model, groups, square(batch), normalizer="none") for batch in batches]
    ours = taylor(model, groups, losses, normalizer="none")
    for group in ours:
        np.testing.assert_allclose(ours[group], (raw[0][group] + raw[1][group]) / 2, rtol=1e-6)
        np.testing.assert_allclose(raw[0][group] / raw[0][group].mean(), one[group][0], rtol=1e-4)


def test_taylor_does_not_change_the_model():
    model, groups, example = settled("resnet_basic")
    model.train()
    model.layers[0].eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        found = taylor(model, groups, square(example))
    assert found["conv1"].max() > 0  # a frozen weight is asked for its gradient, and frozen again
    assert modes == [module.training for module in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert model.fc.weight.grad.eq(1).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_taylor_restores_the_model_after_an_error():
    model, groups, example = settled("row")
    model.train()
    model.conv1.weight.requires_grad_(False)

    def broken(model):
        yield model(example).mean()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        taylor(model, groups, broken)
    assert model.training and not model.conv1.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, "taylor needs losses: pass a function that yields the model's loss"),
        (lambda model: [], "got no batch"),
        (lambda model: [torch.tensor(float("nan"), requires_grad=True)], "one finite number; that of batch 1 is nan"),
        (lambda model: [torch.ones(2, requires_grad=True)], r"of batch 1 is of shape \(2,\)"),
        (lambda model: [torch.tensor(1.0)], "with a gradient, and that of batch 1 has none"),
    ],
)
def test_unusable_losses_are_refused(losses, message):
    model, groups, _ = settled("row")
    with pytest.raises(PlanError, match=message):
        taylor(model, groups, losses)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: magnitude(m, g, p=0), "p=0: must be above 0"),
        (lambda m, g: magnitude(m, g, reduction="first"), "reduction='first': must be mean, sum or max"),
        (lambda m, g: magnitude(m, g, normalizer="lamp"), "normalizer='lamp': must be one of mean, sum, max, none"),
        (lambda m, g: random(m, g, seed=-1), "seed=-1: must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    model, groups, _ = settled("row")
    with pytest.raises(PlanError, match=message):
        call(model, groups)


def test_ablation_is_the_loss_without_a_whole_group():
    model, groups, example = settled("resnet_basic")
    model.train()
    before = copy.deepcopy(model.state_dict())
    scores = ablation(model, groups, square(example), floor=0.5)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    changes = {}
    for group in groups:
        if group.reason is None:
            masked = copy.deepcopy(model)
            for gate_of in group.gates:
                norm, (first, last) = masked.get_submodule(gate_of.norm), gate_of.slice
                norm.weight.data[first:last], norm.bias.data[first:last] = 0, 0
            changes[group.id] = float((masked(example).square().mean() - model(example).square().mean()).detach())
    least = 0.5 * max(changes.values())
    for name, values in scores.items():
        assert values.sum() == pytest.approx(max(changes[name], least), rel=1e-4)
        # The k least important channels have (k ÷ n)² of it.
        order = np.sort(values).cumsum() / values.sum()
        np.testing.assert_allclose(order, (np.arange(1, len(values) + 1) / len(values)) ** 2, rtol=1e-6)
        assert values.argsort().tolist() == gate(model, groups)[name].argsort(kind="stable").tolist()
    assert min(changes.values()) < least < max(changes.values())


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (None, {}, "ablation needs losses: pass a function that yields"),
        (lambda model: [], {}, "needs finite losses; got none"),
        (lambda model: [torch.tensor(float("nan"))], {}, r"needs finite losses; got \[nan\]"),
        (lambda model: [], {"power": 0.5}, r"power=0\.5, floor=0\.05, batches=4: must be power >= 1"),
        (lambda model: [], {"batches": 0}, "batches=0"),
    ],
)
def test_unusable_arguments_of_ablation_are_refused(losses, options, message):
    model, groups, _ = settled("row")
    with pytest.raises(PlanError, match=message):
        ablation(model, groups, losses, **options)


def test_non_finite_weights_and_gates_are_refused():
    model, groups, _ = settled("row")
    with torch.no_grad():
        model.conv2.weight[0, 3] = float("inf")
    with pytest.raises(PlanError, match="a weight of conv1 or its gradient is not finite"):
        magnitude(model, groups)
    with torch.no_grad():
        model.bn3.weight[0] = float("nan")
    with pytest.raises(PlanError, match="a gate of conv2 is not finite"):
        gate(model, groups)


def test_group_of_zeros_scores_zero():
    model, groups, _ = settled("row")
    with torch.no_grad():
        for name in ("conv2", "bn3", "out"):
            model.get_submodule(name).weight.zero_()
    assert not magnitude(model, groups)["conv2"].any()


def test_gate_is_the_effective_gate():
    model, groups, _ = settled("resnet_basic")
    for group in groups:
        if group.reason is None:
            assert np.array_equal(gate(model, groups)[group.id], gate_scores(model, group))


def test_random_does_not_depend_on_the_order_of_groups():
    model, groups, _ = settled("row")
    first, again = random(model, groups, seed=3), random(model, list(reversed(groups)), seed=3)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = random(model, groups, seed=4)
    assert all(not np.array_equal(first[name], other[name]) for name in first)
    assert all(((values >= 0) & (values < 1)).all() for values in first.values())


def test_importances_are_registered():
    assert {"gate", "magnitude", "taylor", "random"} <= set(registry.importances.names())
    assert set(registry.importances.options("magnitude")) == {"p", "reduction", "normalizer", "norms"}


@pytest.mark.parametrize("name", ["bn1.weight", "bn2.running_mean", "bn2.running_var", "conv2.weight"])
def test_check_finite_names_the_tensor(name):
    model = Row()
    check_finite(model)
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    tensor.data.view(-1)[1:3] = float("-inf")
    with pytest.raises(PlanError, match=rf"^{name} is -inf in 2 places of {tensor.numel()}; train with a lower"):
        check_finite(model)
