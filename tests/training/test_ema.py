import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.training.ema import WeightAverage


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4))


def moved(net, generator):
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


@settings(max_examples=20)
@given(decay=st.floats(0.01, 0.999), steps=st.integers(1, 40), seed=st.integers(0, 99))
def test_average_equals_its_definition(decay, steps, seed):
    net, generator = model(), torch.Generator().manual_seed(seed)
    average = WeightAverage(net, decay)
    wanted = None
    for step in range(steps):
        moved(net, generator)
        average.update(net)
        now = {name: value.double() for name, value in net.state_dict().items()}
        kept = 0.0 if step == 0 else min(decay, (1 + step) / (10 + step))
        wanted = {n: v if wanted is None else kept * wanted[n] + (1 - kept) * v for n, v in now.items()}
    for name, value in average.state().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-4, atol=1e-5)
        else:
            assert value == steps
    assert average.steps == steps


def test_average_resumes_from_its_state_and_does_not_change_the_model():
    net, generator = model(), torch.Generator().manual_seed(0)
    average = WeightAverage(net, 0.9)
    for _ in range(3):
        moved(net, generator)
        average.update(net)
    other = WeightAverage(model(), 0.9)
    other.load({name: value.clone() for name, value in average.state().items()}, average.steps)
    moved(net, generator)
    before = copy.deepcopy(net.state_dict())
    for one in (average, other):
        one.update(net)
    assert all(torch.equal(a, b) for a, b in zip(average.state().values(), other.state().values(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    average.copy_to(net)
    assert all(torch.equal(value, average.state()[name]) for name, value in net.state_dict().items())


def test_dead_gates_stay_dead_after_copying_the_average():
    net = model()
    average = WeightAverage(net, 0.9)
    for gate in (1.0, 0.5, 0.0):
        with torch.no_grad():
            net[1].weight[2] = gate
        average.update(net)
    assert average.model[1].weight[2] > 0.1
    average.copy_to(net)
    assert net[1].weight[2] == 0 and (net[1].weight[:2] == 1).all()


def test_state_of_another_model_raises():
    with pytest.raises(RuntimeError):
        WeightAverage(model(), 0.9).load(nn.Linear(2, 2).state_dict(), 3)
