import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import relative_difference
from torch import nn

from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.passes.prelu_to_relu import prelu_to_relu


class Net(nn.Module):
    """A PReLU of a function of two convolutions."""

    def __init__(self, function, slope=(-0.5, 0.9)):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.depthwise = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.prelu, self.function = nn.PReLU(4), function
        nn.init.uniform_(self.prelu.weight, *slope)

    def forward(self, x):
        return self.prelu(self.function(self.a(x), self.depthwise))


def run_pass(*arguments):
    """The number of PReLUs rewritten, of PReLUs left and of convolutions."""
    model = Net(*arguments).eval()
    graph = InferenceGraph(model, torch.randn(1, 3, 15, 17))
    count = prelu_to_relu(graph)
    for shape in ((2, 3, 15, 17), (1, 3, 12, 8)):
        assert relative_difference(model, graph.module, *shape) < 1e-6
    modules = list(graph.module.modules())
    return count, *(sum(isinstance(module, kind) for module in modules) for kind in (nn.PReLU, nn.Conv2d))


@pytest.mark.parametrize(
    ("function", "convs"),
    [
        (lambda a, depthwise: a, 2),
        (lambda a, depthwise: depthwise(a), 3),
        (lambda a, depthwise: depthwise(a) + F.avg_pool2d(a, 3, 1)[..., :1, :1], None),
        (lambda a, depthwise: F.interpolate(depthwise(a), scale_factor=2, mode="bilinear"), 3),
    ],
    ids=["convolution", "depthwise convolution", "sum with another value", "upsampling"],
)
def test_prelu_is_rewritten_if_convolutions_compute_its_input(function, convs):
    assert run_pass(function) == ((1, 0, convs) if convs else (0, 1, 2))


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda a, depthwise: a, (0.96, 0.99)),
        (lambda a, depthwise: F.max_pool2d(a, 2), (-0.5, 0.9)),
        (lambda a, depthwise: depthwise(a).sin(), (-0.5, 0.9)),
    ],
    ids=["slope near 1", "max pooling", "another function"],
)
def test_prelu_is_kept(function, slope):
    assert run_pass(function, slope)[:2] == (0, 1)


def test_prelu_of_a_vector_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.PReLU(4)).eval()
    assert prelu_to_relu(InferenceGraph(model, torch.randn(1, 3, 8, 8))) == 0
