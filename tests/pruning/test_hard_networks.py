"""Regression tests: networks that were once slimmed incorrectly or failed with an unhelpful error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Row, init_norms
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Plan
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.compose import compose
from prunekit.pruning.surgery.optimizer_state import slim_optimizer
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import apply_plan, slim

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv_bn(inp, out, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class Shut(nn.Module):
    """Attention that is closed for nearly all inputs, on dead channels that emit a constant."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.attention, self.skip = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
        self.out = nn.Sequential(*conv_bn(12, 6), nn.Conv2d(6, 2, 1))

    def forward(self, x):
        weights = F.hardsigmoid(self.attention(x.mean((2, 3), keepdim=True)) * 4 - 3.5)
        return self.out(torch.cat([self.a(x) * weights, F.relu(self.skip(x))], 1))


@pytest.mark.parametrize("seed", range(4))
def test_constant_on_the_data_only_is_not_folded(seed):
    torch.manual_seed(seed)
    model = Shut()
    example = init_norms(model, seed, 16)
    with torch.no_grad():
        model.a[1].weight[:4], model.a[1].bias[:4] = 0, 1
    small, equivalence = slim(model, extract(model, find_groups(model, example)), example, exact=True)
    assert equivalence.passed
    other = 3 * torch.randn(64, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(other), small.double()(other), rtol=0, atol=1e-6)


def test_padding_is_found_on_one_pixel_maps():
    torch.manual_seed(0)
    model = nn.Sequential(
        *conv_bn(3, 8, 3, 2), *conv_bn(8, 8, 3, 2), *conv_bn(8, 8, 3, 2), *conv_bn(8, 12, 3, 2), *conv_bn(12, 12, 1),
        *conv_bn(12, 12, 3, 1, 12), nn.Conv2d(12, 4, 1),
    )  # fmt: skip
    example = init_norms(model, 0, 16)
    with torch.no_grad():
        model[13].weight[:4], model[13].bias[:4] = 0, 1  # before the depthwise convolution
    small, equivalence = slim(model, extract(model, find_groups(model, example)), example, exact=True)
    other = torch.randn(2, 3, 80, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(other), small.double()(other), rtol=0, atol=1e-6)
    assert equivalence.passed and equivalence.given_back == 3  # one is zero after its convolution


def test_compose_two_cuts_of_a_grouped_convolution():
    torch.manual_seed(0)
    build = lambda: nn.Sequential(*conv_bn(3, 8), *conv_bn(8, 8, 3, 1, 4), nn.Conv2d(8, 2, 1))  # noqa: E731
    model = build()
    example = init_norms(model)
    groups = find_groups(model, example)
    first = {g.id: [0, 2, 4, 6] for g in groups if g.reason is None}
    small, equivalence = slim(model, make_plan(model, groups, first), example, groups=groups)
    again = find_groups(small, example)
    dead = {g.id: [0] for g in again if g.reason is None}
    smaller, second = slim(small, make_plan(small, again, dead), example, groups=again)
    plan = compose(model, groups, equivalence.plan, again, second.plan)
    made = apply_plan(build(), Plan.from_json(plan.to_json()), example)
    made.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(example), smaller(example))


def test_layer_under_no_grad_is_traced():
    class Frozen(Row):
        def forward(self, x):
            with torch.no_grad():
                x = F.relu(self.bn1(self.conv1(x)))
            return self.out(F.relu(self.bn3(self.conv2(self.bn2(self.depthwise(x))))))

    groups = {group.id: group for group in find_groups(Frozen(), torch.randn(2, 3, 16, 16))}
    assert groups["conv1"].reason is None and len(groups["conv1"].gates) == 2


def test_layer_that_is_not_called_is_listed():
    model = Row()
    model.unused = nn.Conv2d(3, 5, 1)
    groups = {group.id: group for group in find_groups(model, torch.randn(2, 3, 16, 16))}
    assert "train mode only, or never" in groups["unused"].reason and groups["unused"].channels == 5


def test_layer_whose_weight_a_function_reads():
    class Functional(Row):
        def forward(self, x):
            return F.linear(super().forward(x).mean((2, 3)), self.head.weight)

    model = Functional()
    model.head = nn.Linear(model.out.out_channels, 3)
    groups = {group.id: group for group in find_groups(model, torch.randn(2, 3, 16, 16))}
    assert groups["head"].reason == "the model's output"
    # The function has no input that could be measured, so what it reads is zero.
    assert groups["out"].reason is None and groups["out"].zeroed


def test_standardized_weight():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    model = nn.Sequential(
        *conv_bn(3, 8, 3),
        Standardised(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *conv_bn(8, 6),
        nn.Conv2d(6, 2, 1),
    )
    example = init_norms(model)
    groups = {group.id: group for group in find_groups(model, example)}
    assert groups["0"].reason is None and groups["0"].zeroed and groups["6"].reason is None
    with torch.no_grad():
        model[7].weight[:2] = 0
    assert slim(model, extract(model, list(groups.values())), example)[1].passed


def test_find_groups_restores_buffers_and_attributes():
    class Counts(Row):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.grid = None

        def forward(self, x):
            self.seen += 1
            self.grid = torch.arange(int(x.sum().item() * 0 + 3))
            return super().forward(x)

    model = Counts()
    find_groups(model, torch.randn(2, 3, 16, 16))
    assert model.seen == 0 and model.grid is None


def test_gate_expression_grows_linearly_with_residual_blocks():
    class Tower(nn.Module):
        def __init__(self, floors=40):
            super().__init__()
            self.stem, self.out = conv_bn(3, 4), nn.Conv2d(4, 2, 1)
            self.floors = nn.ModuleList(
                [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)) for _ in range(floors)]
            )

        def forward(self, x):
            x = self.stem(x)
            for floor in self.floors:
                x = x + floor(x)
            return self.out(x)

    (group,) = [g for g in find_groups(Tower(), torch.randn(2, 3, 8, 8)) if g.reason is None]
    assert len(group.gates) == 41 and len(str(group.combine)) < 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_is_kept(dtype):
    model = Row()
    example = init_norms(model)
    with torch.no_grad():
        model.bn1.weight[2] = model.bn2.weight[2] = 0
    model, example = model.to(dtype), example.to(dtype)
    small, equivalence = slim(model, extract(model, find_groups(model, example)), example)
    assert equivalence.passed and small.conv1.weight.dtype == dtype and small.conv1.out_channels == 7


def test_mixed_precision_is_kept():
    model = Row()
    example = init_norms(model)
    with torch.no_grad():
        model.bn1.weight[2] = model.bn2.weight[2] = 0
    mixed = copy.deepcopy(model)
    mixed.conv1.half()
    small, _ = slim(mixed, extract(model, find_groups(model, example)), example, groups=find_groups(model, example))
    assert small.conv1.weight.dtype == torch.float16 and small.bn1.weight.dtype == torch.float32


def test_added_bias_of_a_transposed_convolution():
    build = lambda: nn.Sequential(*conv_bn(3, 8), nn.ConvTranspose2d(8, 5, 1, bias=False))  # noqa: E731
    model = build()
    example = init_norms(model)
    with torch.no_grad():
        model[1].weight[:2], model[1].bias[:2] = 0, 1
    plan = make_plan(model, find_groups(model, example), {"0": [0, 1]})
    plan.added_bias = ["3"]
    assert apply_plan(build(), plan, example)[3].bias.shape == (5,)
    plan.added_bias = ["2"]
    with pytest.raises(PlanError, match="has no weight"):
        apply_plan(build(), plan, example)


@pytest.mark.parametrize(
    ("example", "words"),
    [([torch.zeros(1, 3, 8, 8)], "a tuple of"), (torch.zeros(1, 3, 8, 8).bool(), "floats"), (torch.zeros(3), "floats")],
)
def test_error_for_example_that_is_not_a_batch(example, words):
    with pytest.raises(PlanError, match=words):
        find_groups(Row(), example)


def test_error_for_lazy_modules():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    with pytest.raises(PlanError, match="run it once"):
        find_groups(model, torch.zeros(1, 3, 8, 8))
    assert isinstance(model[0], nn.LazyConv2d)


def test_error_for_model_that_needs_float32():
    class Fixed(Row):
        def forward(self, x):
            assert x.dtype == torch.float32, "needs float32"
            return super().forward(x)

    model = Fixed()
    example = init_norms(model)
    with pytest.raises(PlanError, match="float64 on the CPU"):
        slim(model, extract(model, find_groups(model, example)), example)


def test_model_that_creates_tensors_of_the_default_type():
    class Creates(Row):
        def forward(self, x):
            return super().forward(x) @ torch.ones(x.shape[-1] - 2, 3)

    model = Creates()
    example = init_norms(model)
    _, report = slim(model, extract(model, find_groups(model, example)), example)
    assert report.passed


@pytest.mark.parametrize("build", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_error_for_optimizer_state_that_cannot_be_sliced(build):
    model = Row()
    example = init_norms(model)
    optimizer = build(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(example).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example, groups=groups)
    with pytest.raises(PlanError, match="make a new one"):
        slim_optimizer(optimizer, model, small, groups, equivalence.plan)
