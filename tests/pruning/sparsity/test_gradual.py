import json

import numpy as np
import pytest
import torch
from torch import nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.gate_expr import gate_scores
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.sparsity.gradual import GradualPruning
from prunekit.pruning.surgery.slim import slim


class Residual(nn.Module):
    """Two convolutions whose outputs are added, read by a padded depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = torch.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))
        return self.last(torch.relu(self.norm(self.depthwise(x))))


def trained(steps, chosen, total=8, stop=None, **options):
    """Take steps with random gradients; return the model, its groups, the pruning and the largest gates by step."""
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    groups = [group for group in find_groups(model, torch.zeros(1, 3, 8, 8)) if group.reason is None]
    shares = []

    def choose(model, share):
        shares.append(share)
        return {group.id: chosen(share) for group in groups}

    pruning = GradualPruning(model, groups, choose, total, **options)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    course = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        pruning.step()
        norm = model.norm
        course.append(
            [float(value.detach().abs().max()) for value in (norm.weight[:3], norm.bias[:3], norm.weight[3:])]
        )
    return model, groups, pruning, course, shares


def test_chosen_channels_follow_the_course_to_exact_zero_and_stay_there():
    _, _, pruning, course, shares = trained(8, lambda _: {0, 1, 2}, start=0.25, end=0.75)
    weights, biases, others = zip(*course, strict=True)
    assert shares == [1.0] and pruning.is_finished
    # Chosen after step 2 of 8; then (1 − t)² of the value at the choice, with t = 1/4, 1/2, 3/4, 1.
    for values in (weights, biases):
        assert all(v <= values[1] * (1 - t) ** 2 + 1e-6 for v, t in zip(values[2:6], (0.25, 0.5, 0.75, 1), strict=True))
        assert min(values[:5]) > 0 and values[5:] == (0.0, 0.0, 0.0)
    assert min(others) > 0.5


def test_slim_model_computes_the_same_as_the_trained_one():
    model, groups, _, _, _ = trained(8, lambda _: {0, 5}, end=0.5)
    example = torch.randn(4, 3, 8, 8)
    plan = extract(model, groups, threshold=0.0)
    small, report = slim(model, plan, example)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not report.given_back and not report.carriers
    with torch.no_grad():
        dense, slimmed = model.eval()(example), small.eval()(example)
    assert float((dense - slimmed).abs().max()) <= 1e-5 * max(1.0, float(dense.abs().max()))


def test_rounds_choose_again_with_growing_shares():
    model, _, pruning, _, shares = trained(8, lambda share: {0} if share < 1 else {0, 4}, start=0.0, end=1.0, rounds=2)
    assert shares == [0.5, 1.0] and pruning.is_finished
    for norm in (model.norm_a, model.norm_b, model.norm):
        assert (norm.weight == 0).nonzero().flatten().tolist() in ([0, 4], [])
        assert torch.equal(norm.weight == 0, norm.bias == 0)


def test_steps_may_count_for_several():
    _, groups, pruning, _, shares = trained(0, lambda _: {0}, start=0.25, end=0.75)
    assert [pruning.step(count) for count in (1, 1, 3)] == [False, True, False]
    assert len(groups) and shares == [1.0] and not pruning.is_finished
    assert not pruning.step() and pruning.is_finished


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_state_continues_the_course(after):
    options = {"start": 0.25, "end": 0.75}
    _, _, pruning, _, _ = trained(after, lambda _: {0, 1, 2}, **options)
    model, _, other, _, _ = trained(0, lambda _: {0, 1, 2}, **options)
    other.load_state_dict(json.loads(json.dumps(pruning.state_dict())))
    assert other.round == pruning.round and other.state_dict() == pruning.state_dict()
    for _ in range(8 - after):
        with torch.no_grad():
            model.norm.weight.fill_(2.0)
        other.step()
    assert other.is_finished and (model.norm.weight == 0).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"end": 1.5}, "0 <= start < end <= 1"),
        ({"power": 0}, "must be above 0"),
        ({"rounds": 0}, "must be above 0"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(PlanError, match=words):
        trained(0, lambda _: set(), **options)


def test_weights_of_which_the_squares_underflow_become_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = find_groups(model, torch.zeros(1, 3))
    pruning = GradualPruning(model, groups, lambda *_: {"0": [1]}, 2, start=0, end=0.5)
    pruning.step()
    assert pruning.is_finished
    # Queries and keys that are both zero have no gradient, and what Adam still adds is tiny.
    nn.init.constant_(model[0].weight, 1e-30)
    pruning.step()
    assert model[0].weight[1].count_nonzero() == 0 and model[0].weight[0].count_nonzero() == 3


def test_channels_without_gates_shrink_by_the_weights_that_make_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    example = torch.randn(4, 3, 8, 8)
    groups = find_groups(model, example)
    pruning = GradualPruning(model, groups, lambda *_: {"0": {1, 5}, "2": {0}}, 8, start=0.25, end=0.75)
    optimizer, course = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(8):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 8, 8)
        (model(images) - images[:, :2]).square().mean().backward()
        optimizer.step()
        pruning.step()
        with torch.no_grad():
            course.append([float(model[0].weight[5].norm()), float(model[2].weight[:, 0].norm())])
    for sizes in zip(*course, strict=True):
        first = sizes[1]
        assert all(
            size <= (1 - t) ** 2 * first * 1.001 for size, t in zip(sizes[1:6], (0, 0.25, 0.5, 0.75, 1), strict=True)
        )
        assert sizes[5:] == (0, 0, 0) and sizes[2] > 0.5 * first
    assert not model[0].bias[[1, 5]].any() and model[0].weight[[0, 2, 3, 4, 6, 7]].flatten(1).norm(dim=1).min() > 0.1
    scores = {group.id: np.minimum(gate_scores(model, group), 1e9) for group in groups}
    plan = extract(model, groups, 0.0, scores=scores)
    _, report = slim(model, plan, example, groups=groups)
    assert report.drift <= 1e-12 and sum(len(kept) for kept in report.plan.groups.values()) == 6 + 5
