import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import relative_difference, settled
from torch import nn

from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.passes.fold_norms import fold_norms


class Net(nn.Module):
    """Two convolutions, a norm after ``combine`` of their outputs, and an activation."""

    def __init__(self, combine, channels=4, **norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.norm, self.combine = nn.BatchNorm2d(channels, **norm), combine

    def forward(self, x):
        return torch.relu(self.norm(self.combine(self.a(x), self.b(x))))


FOLDABLE = {
    "convolution": (lambda a, b: a, 4),
    "sum": (lambda a, b: a + b, 4),
    "concatenation": (lambda a, b: torch.cat([a, b], 1), 8),
    "average pooling": (lambda a, b: F.avg_pool2d(a, 2) + F.avg_pool2d(b, 2), 4),
    "average pooling with a stride": (lambda a, b: F.avg_pool2d(a, 3, 2) + F.avg_pool2d(b, 3, stride=2), 4),
    "average pooling over the border": (lambda a, b: F.avg_pool2d(a, 3, 3, ceil_mode=True), 4),
    "upsampling": (lambda a, b: F.interpolate(a, size=(32, 32), mode="bilinear"), 4),
}
KEPT = {
    "max pooling": (lambda a, b: F.max_pool2d(a, 2), 4),
    "a sum over windows": (lambda a, b: F.avg_pool2d(a, 2, divisor_override=1), 4),
    "average pooling with zeros": (lambda a, b: F.avg_pool2d(a, 3, 1, 1), 4),
    "product": (lambda a, b: a * b, 4),
    "a term with another user": (lambda a, b: torch.cat([a + b, a], 1), 8),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_norm_is_folded(case):
    model, example = settled(Net(*FOLDABLE[case]))
    graph = InferenceGraph(model, example)
    assert fold_norms(graph) == (["norm"], [])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in graph.module.modules())
    assert relative_difference(model, graph.module, 2, 3, 16, 16) < 1e-6


@pytest.mark.parametrize("case", KEPT)
def test_norm_is_kept(case):
    model, example = settled(Net(*KEPT[case]))
    graph = InferenceGraph(model, example)
    assert fold_norms(graph) == ([], ["norm"])
    assert relative_difference(model, graph.module, 2, 3, 16, 16) == 0


class NormAndActivation(nn.BatchNorm2d):
    """A norm with an activation inside, which checks its input."""

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 axes, not {x.ndim}")
        statistics = self.running_mean, self.running_var
        return F.silu(F.batch_norm(x, *statistics, self.weight, bias=self.bias, training=False, eps=self.eps))


def test_norm_with_an_activation_inside_is_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), NormAndActivation(4, eps=1e-2), nn.Conv2d(4, 2, 1))
    model, example = settled(model)
    graph = InferenceGraph(model, example)
    assert fold_norms(graph) == (["1_"], [])
    assert [node.op for node in graph.nodes if node.op.startswith("call")] == [
        "call_module",
        "call_function",
        "call_module",
    ]
    assert relative_difference(model, graph.module, 2, 3, 16, 16) < 1e-6


def test_norms_without_statistics_or_weights():
    without_statistics, example = settled(Net(FOLDABLE["sum"][0], track_running_stats=False))
    assert fold_norms(InferenceGraph(without_statistics, example)) == ([], ["norm"])
    without_weights, example = settled(Net(FOLDABLE["sum"][0], affine=False))
    graph = InferenceGraph(without_weights, example)
    assert fold_norms(graph) == (["norm"], [])
    assert relative_difference(without_weights, graph.module, 2, 3, 16, 16) < 1e-6
