import json
import math

import numpy as np
import pytest
import torch
from helpers.networks import init_norms

from prunekit.backbones.resnet import resnet
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.sparsity.lambda_controller import MAX_FACTOR, FeedbackController, LambdaController
from prunekit.training import schedules

THRESHOLD = 1e-2
SHARE = 0.4  # of the channels should remain


def plant(controller, steps, optimizer, schedule="one_cycle", seed=0, channels=300):
    """Simulate gates under a task, which pulls each with its own strength, and a decay; the share above the threshold.

    A gate whose task is stronger than λ settles; one whose task is weaker goes to zero, as fast as the optimiser can.
    """
    draw = np.random.default_rng(seed)
    hold, response = 0.01 * np.exp(draw.normal(0, 1.2, channels)), np.exp(draw.normal(0, 0.5, channels))
    gates = draw.uniform(0.8, 1.2, channels)
    first, second = np.zeros(channels), np.zeros(channels)
    rate = [getattr(schedules, schedule)(step / steps) for step in range(steps)]
    progress, history = np.cumsum(rate) / sum(rate), []
    for step in range(steps):
        if step % LambdaController.update_interval(steps) == 0:
            gate = float(np.sort(abs(gates))[int((1 - SHARE) * channels) - 1])
            history.append(controller.update(progress[step], gate, 1.0))
        gradient = 0.01 * (controller.value * response * gates + 0.02 * draw.normal(size=channels))
        gradient -= 2 * hold * gates / (1 + gates**2)
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            mean, root = first / (1 - 0.9 ** (step + 1)), np.sqrt(second / (1 - 0.99 ** (step + 1)))
            gates = gates - 3e-2 * rate[step] * mean / (root + 1e-8)
        else:
            gates = gates - 3.0 * rate[step] * gradient
    return float((abs(gates) > THRESHOLD).mean()), history


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
@pytest.mark.parametrize("factor", [0.1, 1, 10])
@pytest.mark.parametrize("steps", [600, 2000])
def test_budget_is_met_from_a_λ_ten_times_too_small_or_large(optimizer, schedule, factor, steps):
    """The λ at which this plant keeps 40% is about 2.5 (a long training with it shows this)."""
    alive, history = plant(FeedbackController(2.5 * factor, THRESHOLD), steps, optimizer, schedule)
    assert alive == pytest.approx(SHARE, abs=0.06)
    assert max(history) <= 2.5 * max(MAX_FACTOR * factor, 4)
    assert history[-1] == pytest.approx(2.5, rel=1.5), "λ has converged"


def test_budget_is_missed_without_control():
    class Fixed(FeedbackController):
        def update(self, *_):
            return self.value

    found = [plant(Fixed(2.5 * factor, THRESHOLD), 600, "adam")[0] for factor in (0.1, 10)]
    assert found[0] > 0.8 and found[1] < 0.1


def test_λ_stays_in_its_range_without_windup():
    """A gate that does not fall drives λ to its bound; λ leaves it at once when the gate has fallen."""
    controller = FeedbackController(2.0, THRESHOLD)
    for step in range(900):
        weight = controller.update(step / 1000, 1.0)
    assert weight == pytest.approx(2.0 * MAX_FACTOR)
    seen = [controller.update(0.9 + step / 1000, THRESHOLD / 100) for step in range(50)]
    assert seen[-1] < 2.0
    for _ in range(900):
        weight = controller.update(1.0, 1e-9)
    assert weight >= 2.0 / MAX_FACTOR * 0.999


def test_λ_is_reduced_when_the_loss_rises():
    calm, ruined = FeedbackController(1.0, THRESHOLD), FeedbackController(1.0, THRESHOLD)
    for step in range(500):
        progress = step / 500
        calm.update(progress, 0.8, 1.0)
        ruined.update(progress, 0.8, 1.0 if progress < 0.5 else 3.0)
    assert calm.value > 10 and ruined.value < 1


def test_loss_near_zero_may_double():
    controller = FeedbackController(1.0, THRESHOLD)
    for step in range(500):
        excess = controller.loss_excess(2.0 if step < 50 else 0.001 if step < 250 else 0.002, 1 / 500)
    assert excess < 0.05


@pytest.mark.parametrize("cut", [1, 17, 60])
def test_restored_controller_continues_identically(cut):
    draw = np.random.default_rng(0)
    news = [(k / 100, float(draw.uniform(0, 1)), float(draw.uniform(0.5, 2)) if k else None) for k in range(100)]
    whole, first, second = (FeedbackController(3.0, THRESHOLD) for _ in range(3))
    history = [whole.update(*one) for one in news]
    begun = [first.update(*one) for one in news[:cut]]
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict()))) is None and second.value == begun[-1]
    assert begun + [second.update(*one) for one in news[cut:]] == history


def test_gate_at_budget_is_the_smallest_that_meets_it():
    torch.manual_seed(0)
    model = resnet(depth=8, width=8)
    example = init_norms(model)
    groups = find_groups(model, example)
    sizes = SizeModel(model, groups, example.shape[1:])
    goal = sizes.dense.params // 2
    limits = {group.id: group.channels - 1 for group in groups if group.reason is None}
    controller = LambdaController(model, groups, sizes, "params", goal, THRESHOLD, 1.0, limits)
    gate = controller.gate_at_budget()
    scores = np.concatenate(controller._scores())
    below = scores[scores < gate].max()
    controller.threshold = gate
    assert controller.size().params <= goal
    controller.threshold = below
    assert controller.size().params > goal
    controller.threshold = THRESHOLD
    assert controller.metrics() == {"size": {"params": sizes.dense.params}, "budget": {"params": goal}}
    assert math.isclose(controller.update(0.0), 1.0, rel_tol=0.3)


def test_groups_without_a_limit_do_not_count():
    model = resnet(depth=8, width=8)
    example = init_norms(model)
    groups = find_groups(model, example)
    sizes = SizeModel(model, groups, example.shape[1:])
    with torch.no_grad():
        model.get_submodule(groups[0].gates[0].norm).weight.zero_()
    limits = {group.id: group.channels - 1 for group in groups[1:] if group.reason is None}
    controller = LambdaController(model, groups, sizes, "macs", 1, THRESHOLD, 1.0, limits)
    controller.threshold = 10.0
    assert controller.size() == sizes.size_without(limits)
