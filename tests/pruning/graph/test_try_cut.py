import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
