import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import relative_difference
from torch import nn

from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.passes.pad_channels import pad_channels


class Net(nn.Module):
    """Two convolutions with 5 and 7 outputs, a function of their outputs, and a convolution of the result."""

    def __init__(self, function, channels, first=5, second=7):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, first, 3, padding=1), nn.Conv2d(3, second, 1)
        self.prelu = nn.PReLU(channels)
        nn.init.uniform_(self.prelu.weight, -1, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.last, self.function = nn.Conv2d(channels, 2, 1), function

    def forward(self, x):
        return self.last(self.depthwise(self.prelu(self.function(self.a(x), self.b(x)))))


def run_pass(*arguments, **options):
    """The number of channels added, and the output channels of the convolutions."""
    model = Net(*arguments, **options).eval()
    graph = InferenceGraph(model, torch.randn(1, 3, 15, 17))
    count = pad_channels(graph, 8)
    graph.recompile()
    for shape in ((2, 3, 15, 17), (1, 3, 12, 8)):
        assert relative_difference(model, graph.module, *shape) < 1e-6
    return count, [m.out_channels for m in graph.module.modules() if isinstance(m, nn.Conv2d)]


def test_channels_are_padded_through_pointwise_layers():
    count, channels = run_pass(lambda a, b: F.avg_pool2d(F.relu(a), 2), 5)
    assert (count, channels) == (3, [8, 8, 2])


def test_convolution_of_a_single_channel_stays_depthwise():
    model = Net(lambda a, b: a, 1, first=1).eval()
    graph = InferenceGraph(model, torch.randn(1, 3, 15, 17))
    assert pad_channels(graph, 8) == 7
    assert graph.module.depthwise.weight.shape == (8, 1, 3, 3)
    assert relative_difference(model, graph.recompile(), 2, 3, 15, 17) < 1e-6


def test_terms_of_a_sum_are_padded_alike():
    assert run_pass(lambda a, b: a + b, 5, second=5) == (6, [8, 8, 8, 2])


def test_concatenated_convolutions_are_padded_together():
    assert run_pass(lambda a, b: torch.cat([a, b], 1), 12) == (4, [5, 11, 16, 2])


@pytest.mark.parametrize(
    ("function", "channels"),
    [
        (lambda a, b: a.softmax(1), 5),
        (lambda a, b: a + b.mean(1, keepdim=True), 5),
        (lambda a, b: torch.cat([a.flip(1), b.flip(1)], 1), 12),
    ],
    ids=["softmax over channels", "sum with another layout", "channels reordered"],
)
def test_other_readers_prevent_padding(function, channels):
    count, out_channels = run_pass(function, channels)
    assert (count, out_channels[0]) == (0, 5)


def test_multiples_and_outputs_are_not_padded():
    assert run_pass(lambda a, b: a, 8, first=8) == (0, [8, 8, 2])


def test_relu_of_a_vector():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4), nn.ReLU()).eval()
    graph = InferenceGraph(model, torch.randn(1, 3, 8, 8))
    assert pad_channels(graph, 8) == 0
    assert relative_difference(model, graph.recompile(), 2, 3, 8, 8) == 0
