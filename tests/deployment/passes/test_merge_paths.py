import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import relative_difference
from torch import nn

from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.passes.merge_paths import merge_sums, share_pooling


class Net(nn.Module):
    """A function of an image and of two convolutions."""

    def __init__(self, function, second=None):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 3, padding=1, bias=False) if second is None else second
        self.function = function

    def forward(self, x):
        return self.function(x, self.a, self.b)


def run_pass(graph_pass, function, second=None):
    """The number that the pass returns, the modules and functions called afterwards."""
    model = Net(function, second).eval()
    graph = InferenceGraph(model, torch.randn(1, 3, 15, 17))
    count = graph_pass(graph)
    for shape in ((2, 3, 15, 17), (1, 3, 12, 8)):
        assert relative_difference(model, graph.module, *shape) < 1e-6
    convs = sum(isinstance(module, nn.Conv2d) for module in graph.module.modules())
    return count, convs, [node.target for node in graph.nodes if node.op == "call_function"]


def test_merge_sums():
    assert run_pass(merge_sums, lambda x, a, b: F.relu(a(x) + b(x.flip(2)) + x[:, :1]))[:2] == (1, 1)


@pytest.mark.parametrize(
    ("function", "second"),
    [
        (lambda x, a, b: a(x) * b(x), None),
        (lambda x, a, b: a(x) + b(x), nn.Conv2d(3, 4, 1)),
        (lambda x, a, b: a(x) + F.interpolate(b(x[..., ::2, ::2]), size=x.shape[2:], mode="bilinear"), None),
        (lambda x, a, b: (y := a(x)) + b(x) + y.mean(), None),
    ],
    ids=["no sum", "other kernel size", "other resolution", "a term with another user"],
)
def test_merge_sums_does_nothing(function, second):
    assert run_pass(merge_sums, function, second)[:2] == (0, 2)


def pool(x, kernel, **options):
    return F.max_pool2d(x, kernel, ceil_mode=True, **options)


def test_share_pooling():
    count, _, functions = run_pass(share_pooling, lambda x, a, b: torch.cat([a(pool(x, 2)), b(pool(x, 2))], 1))
    assert (count, functions.count(F.max_pool2d)) == (1, 1)
    # Max-pooling by 4 becomes max-pooling by 2 of the pooled image.
    count, _, functions = run_pass(
        share_pooling, lambda x, a, b: a(pool(x, 2)).amax((2, 3)) + b(pool(x, 4)).amax((2, 3))
    )
    assert (count, functions.count(F.max_pool2d)) == (1, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: a(pool(x, 2)).amax((2, 3)) + b(pool(x, 3)).amax((2, 3)),
        lambda x, a, b: a(pool(x, 2)).amax((2, 3)) + b(F.max_pool2d(x, 4)).amax((2, 3)),
        lambda x, a, b: a(pool(x, 2)).amax((2, 3)) + b(pool(x, 4, stride=2)).amax((2, 3)),
        lambda x, a, b: a(F.avg_pool2d(x, 2)).amax((2, 3)) + b(F.avg_pool2d(x, 4)).amax((2, 3)),
    ],
    ids=["no multiple", "no ceil_mode", "overlapping", "average pooling"],
)
def test_share_pooling_does_nothing(function):
    assert run_pass(share_pooling, function)[0] == 0
