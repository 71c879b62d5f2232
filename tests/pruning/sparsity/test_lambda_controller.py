import json
import math

import numpy as np
import pytest
import torch
from helpers.networks import init_norms

from prunekit.backbones.resnet import resnet
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.sparsity.lambda_controller import RANGE, FeedbackController, LambdaController
from prunekit.training import schedules

THRESHOLD = 1e-2
SHARE = 0.4  # of the channels are to live


def plant(controller, steps, optimizer, schedule="one_cycle", seed=0, channels=300):
    """Gates under a task that holds each of them with its own strength, and a decay: what stays above the threshold.

    A gate whose task is stronger than λ settles; one whose task is weaker goes to zero, as fast as the optimiser can.
    """
    draw = np.random.default_rng(seed)
    hold, response = 0.01 * np.exp(draw.normal(0, 1.2, channels)), np.exp(draw.normal(0, 0.5, channels))
    gates = draw.uniform(0.8, 1.2, channels)
    first, second = np.zeros(channels), np.zeros(channels)
    rate = [getattr(schedules, schedule)(step / steps) for step in range(steps)]
    way, course = np.cumsum(rate) / sum(rate), []
    for step in range(steps):
        if step % LambdaController.every(steps) == 0:
            reach = float(np.sort(abs(gates))[int((1 - SHARE) * channels) - 1])
            course.append(controller.update(way[step], reach, 1.0))
        gradient = 0.01 * (controller.now * response * gates + 0.02 * draw.normal(size=channels))
        gradient -= 2 * hold * gates / (1 + gates**2)
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            mean, root = first / (1 - 0.9 ** (step + 1)), np.sqrt(second / (1 - 0.99 ** (step + 1)))
            gates = gates - 3e-2 * rate[step] * mean / (root + 1e-8)
        else:
            gates = gates - 3.0 * rate[step] * gradient
    return float((abs(gates) > THRESHOLD).mean()), course


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
@pytest.mark.parametrize("factor", [0.1, 1, 10])
@pytest.mark.parametrize("steps", [600, 2000])
def test_the_budget_is_met_from_a_λ_that_is_ten_times_off(optimizer, schedule, factor, steps):
    """The λ at which this plant keeps 40% is about 2.5 (a long training with it shows this)."""
    alive, course = plant(FeedbackController(2.5 * factor, THRESHOLD), steps, optimizer, schedule)
    assert alive == pytest.approx(SHARE, abs=0.06)
    assert max(course) <= 2.5 * max(RANGE * factor, 4)
    assert course[-1] == pytest.approx(2.5, rel=1.5), "λ has settled where it has to be"


def test_without_steering_it_is_not():
    class Fixed(FeedbackController):
        def update(self, *_):
            return self.now

    found = [plant(Fixed(2.5 * factor, THRESHOLD), 600, "adam")[0] for factor in (0.1, 10)]
    assert found[0] > 0.8 and found[1] < 0.1


def test_λ_stays_in_its_range_and_does_not_wind_up():
    """A reach that cannot come down drives λ to its bound, and the first good news takes it from there at once."""
    controller = FeedbackController(2.0, THRESHOLD)
    for step in range(900):
        weight = controller.update(step / 1000, 1.0)
    assert weight == pytest.approx(2.0 * RANGE)
    seen = [controller.update(0.9 + step / 1000, THRESHOLD / 100) for step in range(50)]
    assert seen[-1] < 2.0
    for _ in range(900):
        weight = controller.update(1.0, 1e-9)
    assert weight >= 2.0 / RANGE * 0.999


def test_λ_is_taken_back_where_the_task_suffers():
    calm, ruined = FeedbackController(1.0, THRESHOLD), FeedbackController(1.0, THRESHOLD)
    for step in range(500):
        progress = step / 500
        calm.update(progress, 0.8, 1.0)
        ruined.update(progress, 0.8, 1.0 if progress < 0.5 else 3.0)
    assert calm.now > 10 and ruined.now < 1


def test_a_loss_near_zero_may_double():
    """From 2.0 down to 0.001 and up to 0.002 is no harm."""
    controller = FeedbackController(1.0, THRESHOLD)
    for step in range(500):
        strain = controller.strain(2.0 if step < 50 else 0.001 if step < 250 else 0.002, 1 / 500)
    assert strain < 0.05


@pytest.mark.parametrize("cut", [1, 17, 60])
def test_it_goes_on_from_its_state_as_if_nothing_had_been(cut):
    draw = np.random.default_rng(0)
    news = [(k / 100, float(draw.uniform(0, 1)), float(draw.uniform(0.5, 2)) if k else None) for k in range(100)]
    whole, first, second = (FeedbackController(3.0, THRESHOLD) for _ in range(3))
    course = [whole.update(*one) for one in news]
    begun = [first.update(*one) for one in news[:cut]]
    assert second.load(json.loads(json.dumps(first.state()))) == begun[-1]
    assert begun + [second.update(*one) for one in news[cut:]] == course


def test_the_reach_is_what_would_have_to_go():
    torch.manual_seed(0)
    model = resnet(depth=8, width=8)
    example = init_norms(model)
    groups = find_groups(model, example)
    sizes = SizeModel(model, groups, example.shape[1:])
    goal = sizes.dense.params // 2
    most = {group.id: group.channels - 1 for group in groups if group.reason is None}
    steering = LambdaController(model, groups, sizes, "params", goal, THRESHOLD, 1.0, most)
    reach = steering.reach()
    scores = np.concatenate(steering._values())
    below = scores[scores < reach].max()
    steering.threshold = reach
    assert steering.size().params <= goal
    steering.threshold = below
    assert steering.size().params > goal
    steering.threshold = THRESHOLD
    assert steering.figures() == {"size": {"params": sizes.dense.params}, "budget": {"params": goal}}
    assert math.isclose(steering.look(0.0), 1.0, rel_tol=0.3)


def test_groups_that_are_kept_do_not_count():
    model = resnet(depth=8, width=8)
    example = init_norms(model)
    groups = find_groups(model, example)
    sizes = SizeModel(model, groups, example.shape[1:])
    with torch.no_grad():
        model.get_submodule(groups[0].gates[0].norm).weight.zero_()
    most = {group.id: group.channels - 1 for group in groups[1:] if group.reason is None}
    steering = LambdaController(model, groups, sizes, "macs", 1, THRESHOLD, 1.0, most)
    steering.threshold = 10.0
    assert steering.size() == sizes.size_without(most)
