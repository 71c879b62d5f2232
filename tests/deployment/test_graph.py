import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import relative_difference
from torch import nn

from prunekit.deployment.graph import InferenceGraph, Pooling, parse_pooling
from prunekit.errors import ExportError


class Net(nn.Module):
    """A network given by a function of its input and a convolution."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 3, padding=1), function
        self.relu, self.dropout = nn.ReLU(), nn.Dropout()

    def forward(self, x):
        return self.function(self, x)


def graph_of(function):
    return InferenceGraph(Net(function).eval(), torch.randn(2, 3, 8, 10))


def test_each_call_has_its_own_module():
    model = Net(lambda net, x: net.conv(net.conv(x))).eval()
    graph = InferenceGraph(model, torch.randn(1, 3, 8, 8))
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert len(set(calls)) == 2
    assert relative_difference(model, graph.module, 2, 3, 8, 10) == 0
    graph.module.get_submodule(calls[1]).weight.data.zero_()
    assert graph.module.get_submodule(calls[0]).weight.abs().sum() > 0 < model.conv.weight.abs().sum()


def test_dropout_is_removed_and_relu_becomes_a_function():
    graph = graph_of(lambda net, x: net.dropout(net.relu(net.conv(x))))
    assert [node.target for node in graph.nodes if node.op.startswith("call")] == ["conv", F.relu]


def test_terms_of_nested_sums():
    graph = graph_of(lambda net, x: (net.conv(x) + x) + torch.sigmoid(x))
    (total,) = [node for node in graph.nodes if graph.is_outermost_sum(node)]
    assert [term.name for term in graph.terms(total)] == ["conv", "x", "sigmoid"]
    graph = graph_of(lambda net, x: (y := net.conv(x) + x) + y.sin())
    total = graph.output
    assert len(graph.terms(total)) == 2, "the inner sum has another user"


def test_broadcasting_is_not_a_sum_of_equal_shapes():
    graph = graph_of(lambda net, x: net.conv(x) + x.mean(1, keepdim=True))
    assert not any(map(graph.is_add, graph.nodes))


class Named(nn.Module):
    """Its modules are called as operations are."""

    def __init__(self):
        super().__init__()
        self.relu, self.add, self.view = nn.LeakyReLU(), nn.Bilinear(4, 4, 4), nn.Flatten()

    def forward(self, x):
        return self.view(self.relu(self.add(x, x + 1)))


def test_modules_called_as_operations_are_not_taken_for_them():
    graph = InferenceGraph(Named().eval(), torch.randn(1, 3, 4, 4))
    targets = {node.target: node for node in graph.nodes if node.op == "call_module"}
    assert set(targets) == {"relu", "add", "view"} and not graph.is_add(targets["add"])


def test_one_form_for_equal_operations():
    graph = graph_of(lambda net, x: torch.relu(net.conv(input=x).relu()).view(x.shape[0], -1))
    assert [node.target for node in graph.nodes if node.target in (F.relu, "reshape")] == [F.relu, F.relu, "reshape"]
    assert not any("input" in node.kwargs for node in graph.nodes)


@pytest.mark.parametrize(
    ("function", "pooling"),
    [
        (lambda net, x: F.max_pool2d(x, 2), Pooling((2, 2), (2, 2), False)),
        (lambda net, x: F.avg_pool2d(x, (3, 2), stride=1, ceil_mode=True), Pooling((3, 2), (1, 1), True)),
        (lambda net, x: F.max_pool2d(x, 3, padding=1), None),
        (lambda net, x: F.max_pool2d(x, 2, dilation=2), None),
        (lambda net, x: F.avg_pool2d(x, 2, divisor_override=3), None),
    ],
)
def test_parse_pooling(function, pooling):
    assert parse_pooling(graph_of(function).output) == pooling


def test_trace_that_does_not_run():
    with pytest.raises(ExportError, match="cannot trace the model"):
        graph_of(lambda net, x: x if x.sum() > 0 else -x)
