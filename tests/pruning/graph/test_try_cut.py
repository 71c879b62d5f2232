from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekit
from prunekit.pruning.graph.groups import find_groups


class LeNet(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16)
        self.head, self.flatten, self.channels = nn.Linear(16 * 5 * 5, 10), flatten, 16

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.head(self.flatten(self, x))


def reasons(flatten):
    groups = find_groups(LeNet(flatten), torch.randn(2, 3, 32, 32))
    return {group.id: group.reason for group in groups if group.id.startswith("conv")}


@pytest.mark.parametrize(
    "flatten",
    [
        lambda net, x: x.view(-1, 16 * 5 * 5),
        lambda net, x: x.view(2, 400),
        lambda net, x: x.flatten(1) if x.shape[1] == 16 else x.flatten(1)[:, :1],
    ],
)
def test_number_of_channels_in_code_is_unprunable(flatten):
    found = reasons(flatten)
    assert found["conv1"] is None and "relies on its number of channels: test_try_cut.py" in found["conv2"]


@pytest.mark.parametrize(
    "flatten",
    [
        lambda net, x: x.reshape(len(x), net.channels, -1).flatten(1),
        lambda net, x: x.flatten(1) if x.shape[1] == net.channels else x.flatten(1)[:, :1],
    ],
)
def test_attribute_follows(flatten):
    groups = {group.id: group for group in find_groups(LeNet(flatten), torch.randn(2, 3, 32, 32))}
    assert groups["conv2"].reason is None
    assert [(a.module, a.name, a.size, a.lost) for a in groups["conv2"].attributes] == [("", "channels", 16, 1)]


def test_line_of_code_is_named():
    assert "x.view(-1, 16 * 5 * 5)" in reasons(lambda net, x: x.view(-1, 16 * 5 * 5))["conv2"]


@pytest.mark.parametrize("flatten", [lambda net, x: x.view(x.size(0), -1), lambda net, x: torch.flatten(x, 1)])
def test_computed_sizes_are_prunable(flatten):
    assert set(reasons(flatten).values()) == {None}


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 7, 3), nn.Conv2d(8, 7, 3)

    def forward(self, x):
        x = self.conv(x)
        half = x.shape[1] // 2
        return self.a(x[:, :half]) + self.b(x[:, half:])


def test_groups_that_fit_each_other_by_chance_are_found():
    free = [group for group in find_groups(Halves(), torch.randn(2, 3, 8, 8)) if group.reason is None]
    # Both halves lose the same channels.
    assert len(free) <= 1 and all(len(group.readers) == 2 for group in free)


class Window(nn.Module):
    """``window`` has the value of ``width`` by chance."""

    def __init__(self):
        super().__init__()
        self.width = self.window = 32
        self.embed, self.up, self.out = nn.Embedding(30, 16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, tokens):
        tokens = tokens[:, -self.window :]
        return self.out(self.up(self.embed(tokens)).relu().view(*tokens.shape, self.width)).mean(1)


def test_attribute_of_the_same_value_stays():
    groups = {group.id: group for group in find_groups(Window(), torch.randint(30, (4, 8)))}
    assert groups["up"].reason is None and [a.name for a in groups["up"].attributes] == ["width"]


class GroupedBlock(nn.Module):
    """A convolution with groups on the channels whose number the code has."""

    def __init__(self, function):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head, self.function, self.channels = nn.Conv2d(16, 5, 1), function, 16

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(self.function(self, x + F.relu(self.grouped(x))))


@pytest.mark.parametrize(
    ("function", "attributes", "reason"),
    [
        (lambda net, x: x.flatten(2).view(-1, 16, 8, 8), [], "relies on its number of channels: test_try_cut.py"),
        (lambda net, x: x.flatten(2).view(-1, net.channels, 8, 8), ["channels"], None),
        (lambda net, x: x, [], None),
    ],
)
def test_channels_of_convolutions_with_groups_are_tried_in_equal_parts(function, attributes, reason):
    model = GroupedBlock(function)
    (group,) = [g for g in find_groups(model, torch.randn(2, 3, 8, 8)) if g.id == "stem"]
    assert (reason or "") in (group.reason or "") and (group.reason is None) == (reason is None)
    assert [attribute.name for attribute in group.attributes] == attributes


class Reduced(nn.Module):
    """Takes the number of channels of its convolution from its input (SegFormer)."""

    def __init__(self, dim):
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(dim, dim, 2, 2), nn.LayerNorm(dim)

    def forward(self, x):
        b, _, c = x.shape
        y = self.reduce(x.transpose(1, 2).reshape(b, c, 4, 4)).reshape(b, c, -1).transpose(1, 2)
        return x + self.norm(y).mean(1, keepdim=True)


class Configured(nn.Module):
    """Computes with numbers of a configuration, as models of transformers do."""

    def __init__(self, dim=12):
        super().__init__()
        self.config = SimpleNamespace(widths=[7, dim])
        self.patches, self.blocks = nn.Conv2d(3, dim, 2, 2), nn.Sequential(Reduced(dim), Reduced(dim))
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(x.reshape(len(x), -1, self.config.widths[-1]).mean(1))


def test_number_of_the_input_in_several_layers_ties_their_outputs_to_it():
    torch.manual_seed(0)
    model, images = Configured().eval(), torch.randn(2, 3, 8, 8)
    (group,) = [group for group in find_groups(model, images) if group.reason is None]
    assert {"patches.weight", "blocks.0.reduce.weight", "blocks.1.reduce.weight"} <= {m.tensor for m in group.members}


def test_number_in_a_configuration_follows():
    torch.manual_seed(0)
    model, images = Configured().eval(), torch.randn(2, 3, 8, 8)
    small, report = prunekit.Pruner(model, images, importance="magnitude", pruning_ratio=0.25).step()
    assert report.equivalence.passed and small.patches.out_channels == 9
    assert small.config.widths == [7, 9] and model.config.widths == [7, 12]


class OwnConfig(nn.Module):
    """Computes with a number of its own configuration."""

    def __init__(self, dim=12):
        super().__init__()
        self.config, self.up, self.down = SimpleNamespace(width=dim), nn.Linear(8, dim), nn.Linear(dim, 8)

    def forward(self, x):
        return self.down(self.up(x).view(len(x), -1, self.config.width).relu())


def test_number_in_the_configuration_of_each_layer_follows():
    torch.manual_seed(0)
    model = nn.Sequential(*(OwnConfig() for _ in range(3))).eval()
    small, report = prunekit.Pruner(model, torch.randn(2, 5, 8), importance="magnitude", pruning_ratio=0.5).step()
    assert report.equivalence.passed and any(block.config.width < 12 for block in small)
    assert all(block.config.width == block.up.out_features for block in small)


class Matrix(nn.Module):
    """A linear layer that keeps its width, such as GPT-2's."""

    def __init__(self, inputs, width):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.randn(inputs, width))

    def forward(self, x):
        return (x.flatten(0, -2) @ self.weight).view(*x.shape[:-1], self.width)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.half, self.first, self.last = 12, Matrix(8, 24), nn.Linear(12, 8)

    def forward(self, x):
        a, b = self.first(x).split(self.half, -1)
        return self.last(a * b)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Matrix(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_attributes_of_a_layer_are_not_looked_for_in_another_class():
    groups = find_groups(nn.Sequential(Gated(), Whole(), Gated()), torch.randn(2, 5, 8))
    found = {group.id: [f"{a.module}.{a.name}" for a in group.attributes] for group in groups if group.attributes}
    assert found == {
        "0.first#2": ["0.first.width", "0.half"],
        "1.first": ["1.first.width"],
        "2.first": ["2.first.width", "2.half"],
    }
