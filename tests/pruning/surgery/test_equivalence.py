"""The equivalence check on models that change their input, are random, or amplify rounding errors."""

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import init_norms
from torch import Tensor, nn

import prunekit
from prunekit.errors import PlanError
from prunekit.pruning.surgery import rebuild
from prunekit.pruning.surgery.equivalence import EquivalenceReport, check_all, check_equivalence, check_inputs


class Around(nn.Module):
    """A small network, and a function of it and the input."""

    def __init__(self, function=lambda net, x: net(x)):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        )
        self.function = function

    def forward(self, x):
        return self.function(self.net, x)


def slim(function, double=False):
    torch.manual_seed(0)
    model = Around()
    example = init_norms(model, size=16)
    model.function = function
    if double:
        model, example = model.double(), example.double()
    before = example.clone()
    groups = prunekit.find_groups(model, example)
    plan = prunekit.extract(model, groups, pruning_ratio=0.4)
    small, report = prunekit.slim(model, plan, example, groups=groups)
    assert torch.equal(example, before)
    return model, small, report, example


def subtract(net, x):
    x -= 0.5
    return net(x)


def shrink(net, x):
    return net(F.relu_(x.mul_(2)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("function", [subtract, shrink])
def test_models_that_change_their_input_in_place_are_compared_on_the_same_input(function, double):
    _, small, report, example = slim(function, double)
    assert report.passed and report.max_abs_diff < 1e-9
    batch = example.clone()
    prunekit.recalibrate(small, [batch])
    assert torch.equal(batch, example)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net(F.dropout(x, 0.5, training=True)),
        lambda net, x: net(x) + torch.rand(1, dtype=x.dtype),
        lambda net, x: net(x)[..., : int(torch.randint(4, 16, ()))],
    ],
)
def test_models_that_are_random_in_eval_mode_are_named_so(function):
    torch.manual_seed(3)
    with pytest.raises(PlanError, match="the dense model is random in eval mode: two runs on the same input differ"):
        slim(function)


class Counting(Around):
    """Keeps a number between calls; a copy has its own."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2)


def test_models_that_keep_state_between_calls_are_refused():
    torch.manual_seed(0)
    model = Counting()
    example = init_norms(model, size=16)
    with pytest.raises(PlanError, match="random in eval mode: two runs on the same input differ"):
        prunekit.Pruner(model, example, importance="magnitude", pruning_ratio=0.3).step()


class Whitened(Around):
    """Normalizes with the statistics of each batch, also in eval mode, so that the noise would drown the data."""

    def __init__(self):
        super().__init__(lambda net, x: net(x))
        self.net[1] = nn.BatchNorm2d(8, track_running_stats=False)


def test_data_is_compared_without_noise_where_norms_measure_the_batch():
    torch.manual_seed(0)
    model = Whitened()
    example = init_norms(model, size=16)
    model = model.double().eval()
    data, noise = [example.double()], [1e9 * example.double()]
    assert check_all(model, model, data, noise).passed


def test_images_of_one_size_run_together():
    sizes = []
    model = Around(lambda net, x: sizes.append(tuple(x.shape)) or net(x)).double().eval()
    data = [torch.randn(2, 3, 8, 8).double(), torch.randn(1, 3, 9, 9).double()]
    assert check_all(model, model, data, [torch.randn(4, 3, 8, 8).double()]).passed
    assert sorted(sizes) == [(1, 3, 9, 9)] * 2 + [(6, 3, 8, 8)] * 2


@dataclass
class Maps:
    main: Tensor
    name: str = "maps"


class Slotted:
    __slots__ = ("maps",)

    def __init__(self, maps):
        self.maps = maps


class Linked:
    def __init__(self, maps):
        self.parts, self.owner = [maps], self


Pair = namedtuple("Pair", "main side")


@pytest.mark.parametrize(
    "pack", [Maps, Slotted, Linked, lambda y: Pair(y, None), lambda y: UserDict(y=y), lambda y: [{"y": Maps(y)}]]
)
def test_outputs_are_taken_apart(pack):
    model, small, report, example = slim(lambda net, x: pack(net(x)))
    assert report.passed and report.max_abs_diff < 1e-9 and type(small(example)) is type(model(example))


@pytest.mark.parametrize(("pack", "kind"), [(lambda y: "text", "str"), (lambda y: y is None, "bool"), (id, "int")])
def test_outputs_without_tensors_are_named(pack, kind):
    with pytest.raises(PlanError, match=f"it returns {kind}, in which no tensor was found"):
        slim(lambda net, x: pack(net(x)))


def test_empty_outputs_and_other_numbers_of_outputs_are_reported():
    inputs = [torch.randn(2, 3, 8, 8).double()]
    whole, empty = Around().double().eval(), Around(lambda net, x: net(x)[:, :0]).double().eval()
    assert "every output is empty" in check_equivalence(empty, empty, inputs).reason
    twice = Around(lambda net, x: [net(x), x]).double().eval()
    assert check_equivalence(whole, twice, inputs).reason.startswith(
        "output (2, 3, 8, 8), (2, 3, 8, 8), not (2, 3, 8, 8)"
    )


def logistic(steps, above=0.0):
    """The logistic map: above an amplitude it doubles rounding errors at each step."""

    def function(net, x):
        y = net(x)
        z = torch.sigmoid(y)
        rate = torch.where(x.abs().amax((1, 2, 3), keepdim=True) > above, 4.0, 2.0)
        for _ in range(steps):
            z = rate * z * (1 - z)
        return y + z

    return function


def spoil(monkeypatch):
    """Let the surgery change one weight by a hundred-thousandth."""
    fold = rebuild.apply_folding

    def wrong(model, *args):
        model.net[3].weight.data[:, :, 1, 1] *= 1 + 1e-5
        return fold(model, *args)

    monkeypatch.setattr(rebuild, "apply_folding", wrong)


@pytest.mark.parametrize(("steps", "above"), [(25, 0.0), (60, 6.0)])
def test_rounding_errors_that_the_dense_model_amplifies_are_accepted(steps, above):
    _, _, report, _ = slim(logistic(steps, above))
    assert report.passed and report.tolerance < 1e-4


@pytest.mark.parametrize(("steps", "above"), [(5, 0.0), (25, 0.0), (60, 6.0)])
def test_wrong_models_fail_although_the_dense_model_amplifies_rounding_errors(monkeypatch, steps, above):
    spoil(monkeypatch)
    with pytest.raises(PlanError, match="the outputs differ by"):
        slim(logistic(steps, above))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_model_on_which_nothing_can_be_compared_is_refused_with_its_sensitivity(monkeypatch, wrong):
    if wrong:
        spoil(monkeypatch)
    with pytest.raises(PlanError, match=r"too sensitive to be compared: changing its weights .* moves its output by"):
        slim(logistic(60))


def test_sensitive_images_are_left_out_and_the_others_decide():
    torch.manual_seed(0)
    gated = Around(logistic(60, 6.0))
    example = init_norms(gated, size=16)
    gated = gated.double().eval()
    mixed = [torch.cat([batch, 10 * batch]) for batch in check_inputs(gated, example)]
    small = Around(gated.function).double().eval()
    small.load_state_dict(gated.state_dict())
    with torch.no_grad():
        small.net[3].weight[0] *= 1 + 1e-15
    report = check_equivalence(gated, small, mixed)
    assert report.passed and report.sensitivity > 0.1 and report.max_abs_diff < 1e-6
    with torch.no_grad():
        small.net[3].weight[0] *= 1 + 1e-4
    report = check_equivalence(gated, small, mixed)
    assert not report.passed and "the outputs differ by" in report.reason and report.tolerance < 1e-4


@pytest.mark.parametrize("factor", [1.0, 1e6])
@pytest.mark.parametrize("same_batch", [False, True])
def test_each_image_has_its_own_tolerance(factor, same_batch):
    torch.manual_seed(0)
    dense = nn.Linear(3, 2).double()
    wrong = copy.deepcopy(dense)
    with torch.no_grad():
        wrong.bias[0] += 1e-3
    images = torch.randn(2, 3, dtype=torch.float64)
    large = torch.full_like(images, factor)
    inputs = [torch.cat([images, large])] if same_batch else [images, large]
    report = check_equivalence(dense, wrong, inputs)
    assert not report.passed and "the outputs differ by 0.001, more than" in report.reason
    assert report.tolerance < 1e-5


def overflow(net, x):
    return net(x) + torch.exp(torch.relu(x.abs().amax((1, 2, 3), keepdim=True) - 8) * 1e3)


def test_noise_on_which_the_dense_model_overflows_says_nothing():
    _, _, report, example = slim(overflow)
    assert report.passed and float(example.abs().max()) < 8


def test_a_slim_model_that_alone_overflows_fails():
    whole, wrong = Around().double().eval(), Around(lambda net, x: net(x) / 0).double().eval()
    noise = [10 * torch.randn(2, 3, 8, 8).double()]
    assert check_all(whole, whole, noise, noise).passed
    assert check_equivalence(whole, wrong, noise).reason == "an output of the slim model is not finite"
    assert check_all(whole, whole, noise, [torch.full_like(noise[0], torch.nan)]).passed


def test_of_large_images_small_ones_are_compared_and_wrong_models_fail(monkeypatch):
    torch.manual_seed(0)
    model = Around()
    example = init_norms(model, size=160)
    groups = prunekit.find_groups(model, example)
    plan = prunekit.extract(model, groups, pruning_ratio=0.4)
    _, report = prunekit.slim(model, plan, example, groups=groups)
    assert len(report.inputs) > 1 and max(side for shape in report.inputs for side in shape[2:]) < 100
    assert report.drift > 0 and report.float32_diff < 1e-4
    spoil(monkeypatch)
    with pytest.raises(PlanError, match="the outputs differ by"):
        prunekit.slim(model, plan, example, groups=groups)


def test_a_network_that_answers_two_images_alike_is_not_dead():
    torch.manual_seed(0)
    model = Around()
    example = init_norms(model, size=16)
    example = torch.cat([example[:1], example[:1], example])
    groups = prunekit.find_groups(model, example)
    plan = prunekit.extract(model, groups, pruning_ratio=0.4)
    _, report = prunekit.slim(model, plan, example, groups=groups)
    assert report.passed and report.inputs[0][0] > 2


def test_drift_of_outputs_that_differ_in_shape_is_not_measured():
    """As of a detector that finds more than the dense model."""
    report = EquivalenceReport(0.0, 1e-6, [])
    report.measure_drift([torch.ones(5, 4)], [torch.ones(3, 4)])
    assert "drift" not in report.to_json() and "differ in shape" in report.describe_drift()
    report.measure_drift([torch.ones(3, 4)], [torch.ones(3, 4)])
    assert report.drift == 0 and "at most 0" in report.describe_drift()
