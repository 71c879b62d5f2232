"""Networks that are difficult to trace or slim, compared on inputs and sizes other than the check's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.marks import seeds
from helpers.networks import init_norms
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim


class Net(nn.Module):
    """conv1, norm1, then ``middle``, then conv2, norm2, out."""

    def __init__(self, middle=None, seen=8, reader=None, **parts):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = reader or nn.Conv2d(seen, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 2, 1)
        self.middle = middle or (lambda net, x: x)
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x):
        x = self.middle(self, F.relu(self.norm1(self.conv1(x))))
        return self.out(F.relu(self.norm2(self.conv2(x))))


class PreActivation(nn.Module):
    """A stream that several padded convolutions read, each after its own norm and ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(4)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3)])
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = x + conv(F.relu(norm(x)))
        return self.out(F.relu(self.norms[-1](x)))


class Outputs(Net):
    """Returns a structure built from the output and the input of the last norm."""

    def __init__(self, build):
        super().__init__(reader=nn.Conv2d(8, 6, 1, bias=False))
        self.build = build

    def forward(self, x):
        between = self.conv2(F.relu(self.norm1(self.conv1(x))))
        return self.build(self.out(F.relu(self.norm2(between))), between)


class Loud(Net):
    """One output is ten million times larger than the other."""

    def forward(self, x):
        return super().forward(x), 1e7 * x


class Weighed(Net):
    """A sum that scales one term, followed by a norm."""

    def __init__(self):
        super().__init__(reader=nn.Conv2d(8, 6, 1), other=nn.Conv2d(8, 6, 1))

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.out(F.relu(self.norm2(torch.add(self.other(x), self.conv2(x), alpha=0.5))))


class SharedNorm(Net):
    def __init__(self):
        super().__init__(other=nn.Conv2d(8, 6, 1))

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.out(F.relu(self.norm2(self.conv2(x))) + self.norm2(self.other(x)))


class Aside(Net):
    """``aside`` reads detached channels."""

    def __init__(self):
        super().__init__(aside=nn.Conv2d(8, 2, 1))

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.out(F.relu(self.norm2(self.conv2(x)))) + self.aside(x.detach())


def checked_size(net, x):
    assert x.shape[-1] == 16, "only 16 × 16"
    return x


NETWORKS = {
    "pre-activation": PreActivation,
    "norm without affine": lambda: Net(
        lambda net, x: net.norm(net.depthwise(x)),
        depthwise=nn.Conv2d(8, 8, 1, groups=8),
        norm=nn.BatchNorm2d(8, affine=False),
    ),
    "several outputs per channel": lambda: Net(
        lambda net, x: F.relu(net.norm(net.depthwise(x))),
        seen=24,
        depthwise=nn.Conv2d(8, 24, 3, padding=1, groups=8),
        norm=nn.BatchNorm2d(24),
    ),
    "buffer added": lambda: Net(lambda net, x: x + net.pos, pos=torch.randn(1, 8, 1, 1)),
    "frozen parameter added": lambda: Net(
        lambda net, x: net.pos + x, pos=nn.Parameter(torch.randn(8, 1, 1), requires_grad=False)
    ),
    "map added": lambda: Net(lambda net, x: x + net.pos, pos=torch.randn(1, 1, 16, 16)),
    "mean over channels": lambda: Net(lambda net, x: x - x.mean(1, keepdim=True)),
    "transposed beside a skip": lambda: Net(
        lambda net, x: torch.cat([net.up1(x), F.relu(net.norm(net.skip(x))), net.up2(x)], 1),
        seen=24,
        up1=nn.ConvTranspose2d(8, 4, 1),
        up2=nn.ConvTranspose2d(8, 12, 1),
        skip=nn.Conv2d(8, 8, 1),
        norm=nn.BatchNorm2d(8),
    ),
    "halves side by side": lambda: Net(
        lambda net, x: torch.cat([x.chunk(2, 1)[0], net.norm(net.conv(x.chunk(2, 1)[1]))], 1),
        conv=nn.Conv2d(4, 4, 1),
        norm=nn.BatchNorm2d(4),
    ),
    "asserts its size": lambda: Net(checked_size),
    "called by keyword": lambda: Net(lambda net, x: net.more(input=x), more=nn.Conv2d(8, 8, 3, padding=1)),
    "weight norm": lambda: Net(reader=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1))),
    "a sum that weighs": Weighed,
    "a norm called twice": SharedNorm,
    "a tuple with None": lambda: Outputs(lambda y, between: (y, None, [y])),
    "a dict with a class and a loss": lambda: Outputs(
        lambda y, between: {"y": y, "class": y.argmax(1), "loss": y.square().mean()}
    ),
    "what comes before the norm": lambda: Outputs(lambda y, between: (y, between)),
}


def slimmed(model, seed, exact=True):
    example = init_norms(model, seed, size=16, beta=0.7)
    groups = find_groups(model, example)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in groups:
            dead = torch.rand(group.channels, generator=generator) < 0.5
            dead[torch.randint(group.channels, (), generator=generator)] = False
            for gate in group.gates if group.reason is None else ():
                model.get_submodule(gate.norm).weight[gate.slice[0] : gate.slice[1]][dead] = 0
    return groups, *slim(model, extract(model, groups), example, groups=groups, exact=exact)


def test_each_output_has_its_own_tolerance():
    torch.manual_seed(0)
    model = Loud()
    _, small, equivalence = slimmed(model, 0)
    assert equivalence.passed and equivalence.max_abs_diff <= equivalence.tolerance
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small.double().eval()(image)[0], model.double()(image)[0], rtol=1e-5, atol=1e-5)


def first(output):
    return output if isinstance(output, torch.Tensor) else next(iter(getattr(output, "values", lambda: output)()))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_slim_model_is_equivalent_on_other_inputs(name, seed, exact):
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    _, small, equivalence = slimmed(model, seed, exact)
    assert (
        equivalence.passed
        and equivalence.given_back <= {"map added": 32, "several outputs per channel": 8}.get(name, 4) * exact
    )
    dense, small = copy.deepcopy(model).double().eval(), small.double().eval()
    for size in () if not exact else (16,) if name in ("asserts its size", "map added") else (16, 21, 30):
        image = 3 * torch.randn(3, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(first(small(image)), first(dense(image)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "group", "reason"),
    [
        ("weight norm", "conv1", "passes conv2.parametrizations.weight.0 (_WeightNorm)"),
        ("mean over channels", "conv1", "where a channel without weights is not zero"),
    ],
)
def test_unprunable_groups_have_a_reason(name, group, reason):
    groups = {group.id: group for group in find_groups(NETWORKS[name](), torch.randn(2, 3, 16, 16))}
    assert reason in groups[group].reason


@pytest.mark.parametrize("name", ["buffer added", "frozen parameter added"])
def test_what_belongs_to_no_layer_follows(name):
    groups = {group.id: group for group in find_groups(NETWORKS[name](), torch.randn(2, 3, 16, 16))}
    assert groups["conv1"].reason is None


def test_offset_beside_an_unknown_operation():
    groups = {g.id: g for g in find_groups(NETWORKS["transposed beside a skip"](), torch.randn(2, 3, 16, 16))}
    assert groups["skip"].reason is None and [m.offset for m in groups["skip"].readers] == [4]


def test_shared_weight_is_sliced_once():
    model = Net(lambda net, x: net.norm3(net.conv3(x)), conv3=nn.Conv2d(8, 8, 1), norm3=nn.BatchNorm2d(8))
    model.again, model.norm4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    model.again.weight = model.conv3.weight
    model.middle = lambda net, x: net.norm4(net.again(net.norm3(net.conv3(x))))
    example = init_norms(model, 0, size=16)
    small, report = slim(model, make_plan(model, find_groups(model, example), {"conv1": {1, 6}}), example)
    assert report.passed and small.again.weight is small.conv3.weight
    assert len(small.conv3.weight) == small.again.out_channels == small.conv3.in_channels == 6


def test_failing_model_gives_a_one_line_error_and_keeps_no_hook():
    model = Net(checked_size)
    with pytest.raises(PlanError, match="only 16"):
        find_groups(model, torch.randn(2, 3, 20, 20))
    assert not any(module._forward_hooks for module in model.modules())


def test_detached_reader_follows():
    groups, small, report = slimmed(Aside(), 0)
    assert groups[0].reason is None and report.passed
    assert small.aside.in_channels == small.conv1.out_channels < 8


@pytest.mark.parametrize("name", ["prelu", "relu"])
def test_prelu_with_the_name_of_a_function(name):
    model = Net(lambda net, x: x)
    model.add_module(name, nn.PReLU(8))
    model.forward = lambda x: model.out(
        F.silu(model.norm2(model.conv2(model.get_submodule(name)(model.norm1(model.conv1(x))))))
    )
    example = torch.randn(2, 3, 16, 16)
    groups = find_groups(model, example)
    model.train()
    with DynamicWeightDecay(model, groups, weight=1.0) as decay:
        model(example)
        seen = model.get_submodule(name)(model.norm1(model.conv1(example)))
        gates = model.norm1.weight, model.norm2.weight
        after = F.silu(model.norm2(model.conv2(seen)))
        wanted = sum((y.mean((2, 3)).abs().mean(0) * g**2).sum() / 2 for y, g in zip((seen, after), gates, strict=True))
        torch.testing.assert_close(decay.penalty(), wanted)
