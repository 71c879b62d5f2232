"""A graph cannot be captured without a GPU: these tests replace the capture by a plain call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay, NoDecay
from prunekit.training.cuda_graphs import GraphedForward


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).train()


def capture(probe, arguments, allow_unused_input):
    """As the capture of a graph: several forward passes of warm-up; a replay calls no hooks of the decay."""
    for _ in range(3):
        probe(*arguments)
    return probe.forward


def test_penalty_and_statistics_are_those_of_a_plain_forward(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    images = torch.randn(4, 3, 9, 9)
    decay = DynamicWeightDecay(model, find_groups(model, images), 0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with decay:
        expected = model(images), decay.penalty()
        statistics = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        graphed = GraphedForward(model, decay, False, print)
        found = graphed(images), decay.penalty()
        assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_two_forwards_add_up_in_the_penalty(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    images = torch.randn(2, 4, 3, 9, 9)
    decay = DynamicWeightDecay(model, find_groups(model, images[0]), 0.1, branch_weights="flops")
    with decay:
        for batch in images:
            model(batch)
        expected = decay.penalty()
        graphed = GraphedForward(model, decay, False, print)
        for batch in images:
            graphed(batch)
        assert torch.equal(decay.penalty(), expected)


def test_a_model_that_cannot_be_captured_trains_without_graphs(model, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    said = []
    images = torch.randn(4, 3, 9, 9)
    graphed = GraphedForward(model, NoDecay(model, []), False, said.append)
    for _ in range(2):
        model.eval()
        assert torch.equal(graphed(images), model(images))
    assert said == [
        "train.cuda_graphs: the model cannot be captured (operation not permitted when stream is capturing); training "
        "without"
    ]
