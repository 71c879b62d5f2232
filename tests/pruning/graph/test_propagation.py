import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.leaky_relu(x, 0.1, inplace=True)


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight=norm.weight, bias=norm.bias)


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, self.scale)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.exp(self.scale) * x + self.bias


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def first_group(*middle, reader=nn.Conv2d):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *middle, reader(8, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return next(group for group in find_groups(model, torch.randn(2, 3, 9, 9)) if group.id == "0")


@pytest.mark.parametrize("norm", [NormAct(8), FunctionalNorm()], ids=["subclass", "functional"])
def test_subclasses_and_functional_norms_are_norms(norm):
    group = first_group(norm)
    assert group.reason is None and len(group.gates) == 1


def test_activation_inside_of_a_norm():
    assert [gate.activation for gate in first_group(NormAct(8)).gates] == ["leaky_relu"]


def test_parameters_of_an_own_norm_follow():
    group = first_group(OwnNorm())
    assert group.reason is None and {m.tensor for m in group.members if m.module == "1"} == {
        "1.scale",
        "1.mean",
        "1.var",
    }


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.1, True), nn.ELU(1, True), nn.SELU(True), nn.CELU(1, True), nn.Threshold(0, 0, True)]
)
def test_activations_in_place(activation):
    assert first_group(nn.BatchNorm2d(8), activation).reason is None


def test_learnable_scale_of_one_element():
    assert first_group(nn.BatchNorm2d(8), Affine()).reason is None


PER_CHANNEL = torch.rand(8, 1, 1) + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / PER_CHANNEL,
        lambda x: PER_CHANNEL / x,
        lambda x: x.div_(PER_CHANNEL),
        lambda x: x.clamp(min=PER_CHANNEL),
        lambda x: x.clamp_min(PER_CHANNEL),
        lambda x: x.clamp_(max=PER_CHANNEL),
        lambda x: x**PER_CHANNEL,
        lambda x: PER_CHANNEL**x,
        lambda x: torch.rsub(x, PER_CHANNEL),
        lambda x: torch.where(x > 0, x, PER_CHANNEL),
        lambda x: torch.lerp(x, PER_CHANNEL, 0.5),
        lambda x: torch.addcmul(x, PER_CHANNEL, PER_CHANNEL),
        lambda x: torch.maximum(x, PER_CHANNEL),
    ],
)
def test_tensor_that_differs_between_channels_is_unprunable(function):
    assert "differs between channels" in first_group(nn.BatchNorm2d(8), Apply(function)).reason


@pytest.mark.parametrize("function", [lambda x: x / 2, lambda x: 1 - x, lambda x: x.clamp(0, torch.tensor(1.0).item())])
def test_numbers_keep_channels(function):
    assert first_group(nn.BatchNorm2d(8), Apply(function)).reason is None


def test_vector_times_a_number_in_a_tensor():
    """torchvision's detectors compute such scales."""
    scaled = Apply(lambda x: x + 0 * (x.mean((1, 2, 3)) * torch.tensor(2.0)).view(-1, 1, 1, 1))
    group = first_group(nn.BatchNorm2d(8), scaled)
    # The mean is added to channels that are zero, too.
    assert group.reason == "read by 3 (Conv2d), where a channel without weights is not zero"
    assert group.zeroed and [s.operation for s in group.statistics] == ["mean"]


@pytest.mark.parametrize(
    ("middle", "reader", "pads"),
    [
        ((), nn.Conv2d, False),
        ((), SamePadding, True),
        ((nn.ZeroPad2d(1), nn.ReLU()), nn.Conv2d, True),
        ((Apply(lambda x: F.pad(x, [0, x.shape[2] % 2 - 1])),), nn.Conv2d, True),
        ((nn.AvgPool2d(3, 1, 1),), nn.Conv2d, True),
        ((nn.AvgPool2d(3, 1, 1, count_include_pad=False),), nn.Conv2d, False),
        ((nn.MaxPool2d(3, 1, 1),), nn.Conv2d, False),
        ((), nn.ConvTranspose2d, True),
    ],
)
def test_readers_of_padded_maps(middle, reader, pads):
    assert [member.pads for member in first_group(nn.BatchNorm2d(8), *middle, reader=reader).readers] == [pads]


def test_unsupported_layer_is_named_with_its_class():
    assert "passes 2 (LocalResponseNorm), which" in first_group(nn.BatchNorm2d(8), nn.LocalResponseNorm(3)).reason


def test_groups_of_a_group_norm_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
    outer, inner, *_ = find_groups(model, torch.randn(2, 3, 8, 8))
    assert outer.reason == "passes 1 (GroupNorm), whose number of groups stays" and outer.channels == 2
    assert inner.reason is None and inner.channels == 4 and inner.members[0].repeats == ((2, 4),)
    assert inner.members[0].entries(np.array([1])).tolist() == [1, 5]


def test_tokens_and_features_of_one_length_are_not_confused():
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1))
    reasons = {group.id: group.reason for group in find_groups(model, torch.randn(2, 3, 8))}
    assert reasons["2"] == "passes 4 (Conv1d), as positions" and reasons["0"] is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(12, 2)

    def forward(self, x):
        return self.last(F.linear(F.relu(self.second(F.relu(self.first(x)))), self.second.weight.t()).relu())


def test_weight_of_another_layer_is_used_elsewhere():
    groups = {group.id: group for group in find_groups(Tied(), torch.randn(4, 8))}
    # The function makes what ``last`` reads of the weight that ``second`` reads with.
    assert groups["first"].reason is None and groups["first"].zeroed
    assert {m.tensor for m in groups["first"].members} >= {"first.weight", "second.weight", "last.weight"}
    model, example = Tied(), torch.randn(4, 8)
    plan = make_plan(model, find_groups(model, example), {"first": {0, 5}, "second": {1}})
    small, report = slim(model, plan, example)
    assert report.passed and small.second.weight.shape == (5, 10)


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.PReLU()])
def test_layers_of_tokens_are_followed(after):
    model = nn.Sequential(nn.Linear(8, 12), after, nn.Linear(12, 8), nn.Flatten(), nn.Linear(48, 5))
    groups = {group.id: group for group in find_groups(model, torch.randn(4, 6, 8))}
    assert groups["0"].reason is None and [member.tensor for member in groups["0"].readers] == ["2.weight"]


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda x: torch.cat(x.split(4, 1)[::-1], 1), "split (test_propagation.py"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), None),
        (lambda x: torch.cat(x.chunk(3, 1)[::-1], 1), "passes chunk (test_propagation.py"),
        (lambda x: torch.einsum("nchw,c->nchw", x, torch.linspace(0, 1, 8)), "differs between channels"),
        (lambda x: F.avg_pool2d(x.flatten(2), 3, 1, 1).unflatten(2, (7, 7)), "passes avg_pool2d (test_propagation.py"),
        (lambda x: torch.vmap(nn.Identity())(x), None),
    ],
)
def test_operations_in_between(middle, reason):
    found = first_group(nn.BatchNorm2d(8), Apply(middle)).reason
    assert found is None if reason is None else reason in found


def test_norm_without_parameters_is_shared_by_its_calls():
    class Twice(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.a, self.b, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.out(self.norm(self.a(x))) * self.out(self.norm(self.b(x)))

    for norm in (nn.BatchNorm2d(8, affine=False), nn.InstanceNorm2d(8, track_running_stats=True)):
        (group,) = [group for group in find_groups(Twice(norm), torch.randn(2, 3, 8, 8)) if group.reason is None]
        assert {"a", "b"} <= set(group.producers) and len({m.tensor for m in group.members}) == len(group.members)


def test_number_of_features_follows_the_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    example = torch.randn(2, 3, 8, 8)
    groups = find_groups(model, example)
    assert [(a.module, a.name) for a in groups[0].attributes] == [("1", "num_features")]
    plan = make_plan(model, groups, {"0": {1, 2, 5}})
    assert slim(model, plan, example, groups=groups)[0][1].num_features == 5


def test_gate_of_a_sigmoid_does_not_make_a_product_zero():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            value, gate = self.norm(self.conv(x)).chunk(2, 1)
            return self.out(value * torch.sigmoid(gate))

    model = Gated()
    model.norm.weight.data = torch.tensor([1.0, 2, 3, 0, 0, 0, 0, 0])
    (group,) = [group for group in find_groups(model, torch.randn(2, 3, 8, 8)) if group.reason is None]
    assert [gate.slice for gate in group.gates] == [(0, 4)]
    assert gate_scores(model, group).round(3).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    "end",
    [
        lambda x: torch.cat([x.view(-1)] * 2)[None],
        lambda x: x.view(-1)[torch.tensor([0, 1, 2, 3])].repeat(6)[None],
        lambda x: x.view(-1).t().repeat(2)[None],
    ],
)
def test_tensors_without_a_batch_axis(end):
    model = nn.Sequential(nn.Conv2d(3, 12, 3), Apply(lambda x: x.mean((2, 3))), Apply(end), nn.Linear(24, 6))
    assert {group.id for group in find_groups(model, torch.randn(1, 3, 8, 8))} >= {"0", "3"}


def test_model_that_differentiates_is_traced():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 1)

        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                x = x.clone().requires_grad_()
                energy = self.last(torch.tanh(self.first(x)))
                return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    model, example = Energy(), torch.randn(4, 8)
    groups = find_groups(model, example)
    assert {group.id for group in groups if group.reason is None} == {"first"}
    small, report = slim(model, make_plan(model, groups, {"first": {0, 7}}), example)
    assert report.passed and small.last.in_features == 10


@pytest.mark.parametrize(
    ("function", "prunable"),
    [
        (lambda x: x.unfold(-1, 3, 1).mean(-1), True),  # counts from the end of the input, not of the output
        (lambda x: x.unfold(-3, 3, 1).mean(-1), False),
        (lambda x: torch.roll(x, 1), False),  # of all values in a row
        (lambda x: torch.roll(x, 1, -1), True),
        (lambda x: torch.msort(x), True),  # along the images
        (lambda x: torch.sort(x, stable=True, dim=-1)[0], True),
        (lambda x: torch.sort(x, 1)[0], False),
        (lambda x: torch.quantile(x, 0.5, -1), True),
    ],
)
def test_axes_that_an_operation_is_along(function, prunable):
    after = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
    before = nn.Sequential(nn.Conv2d(3, 8, 1), Apply(function))
    model = nn.Sequential(before, Apply(lambda x: x if x.dim() == 4 else x[..., None]), after)
    model(torch.randn(2, 3, 6, 6))
    groups = {group.id: group.reason for group in find_groups(model, torch.randn(2, 3, 6, 6))}
    assert (groups["0.0"] is None) is prunable
