"""What a training state holds comes back as it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.config.schema import Training
from prunekit.errors import TrainingError
from prunekit.pruning.sparsity.decay import NoDecay
from prunekit.runs.run_dir import RunDir
from prunekit.training.checkpoint import TrainingPosition, restore_state, save_state
from prunekit.training.gate_history import GateHistory


class Parts:
    """What steers λ, and what cuts: they are handed what they gave."""

    def __init__(self, state, looks=None):
        self.held, self.looks = state, looks

    def state(self):
        return self.held

    def load(self, state):
        self.held = state
        return 0.125

    def seen(self):
        return self.looks

    def begin(self, looks=None):
        self.looks = looks


def job(run, **parts):
    section = Training(epochs=3)
    return SimpleNamespace(stage="train", section=section, run=run, steering=None, shrinking=None, **parts)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with RunDir.start(tmp_path_factory.mktemp("runs") / "run", "name: x\n", {}) as made:
        yield made


numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(
    epoch=st.integers(0, 9),
    step=st.integers(1, 99),
    sums=st.tuples(numbers, numbers, numbers),
    told=st.tuples(numbers, numbers),
    seconds=numbers,
    best=st.none() | st.tuples(numbers, st.integers(0, 9)),
    drawn=st.integers(0, 5),
)
def test_a_place_within_an_epoch(run, epoch, step, sums, told, seconds, best, drawn):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    generator, device = torch.Generator().manual_seed(1), torch.device("cpu")
    torch.rand(drawn, generator=generator)
    torch.rand(drawn)
    place = TrainingPosition(epoch, step, torch.tensor(sums, dtype=torch.float64), told, seconds, best)
    place.remember(generator, device)
    looks = {"a": np.array([0.5, np.inf]), "b.c": np.zeros(0)}
    ours = job(run)
    ours.steering, ours.shrinking = Parts({"now": seconds}), Parts({"cuts": []}, looks)
    save_state(model, optimizer, GateHistory(model, [], 0.0), ours, place, 100)
    wanted = torch.rand(3, generator=generator), torch.rand(3)

    theirs, decay = job(run), NoDecay(model, [])
    theirs.steering, theirs.shrinking = Parts({}), Parts({})
    found = run.load_checkpoint("train")
    for path in (run.path / "checkpoints").iterdir():
        path.unlink(missing_ok=True)
    held = restore_state(model, optimizer, GateHistory(model, [], 0.0), theirs, decay, 100, found)
    assert (held.epoch, held.step, held.told, held.seconds, held.best) == (epoch, step, told, seconds, best)
    assert torch.equal(held.sums, place.sums)
    assert theirs.steering.held == {"now": seconds} and decay.weight == 0.125
    assert sorted(theirs.shrinking.looks) == sorted(looks)
    assert all(np.array_equal(theirs.shrinking.looks[name], looks[name]) for name in looks)
    other = torch.Generator()
    torch.rand(7)
    held.remind(other, device)
    assert torch.equal(torch.rand(3, generator=other), wanted[0]) and torch.equal(torch.rand(3), wanted[1])


def test_between_two_epochs_the_generators_and_what_was_seen_are_not_carried(run):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ours = job(run)
    ours.shrinking = Parts({}, {"a": np.zeros(2)})
    save_state(model, optimizer, GateHistory(model, [], 0.0), ours, TrainingPosition(1), 100)
    arrays, _ = run.load_checkpoint("train")
    assert {name.partition("/")[0] for name in arrays} == {"model"}
    held = restore_state(
        model, optimizer, GateHistory(model, [], 0.0), ours, NoDecay(model, []), 100, (arrays, {"epoch": 1})
    )
    assert (held.epoch, held.step, held.random) == (1, 0, {})


@pytest.mark.parametrize("what", ["1.running_var", "0.weight", "0/exp_avg"])
def test_no_state_holds_a_number_that_is_not_finite(run, what):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    kept = enumerate(optimizer.state.values())
    moments = {f"{index}/{key}": value for index, one in kept for key, value in one.items()}
    tensor = {**model.state_dict(), **moments}[what]
    tensor.view(-1)[1] = float("nan")
    before = run.latest_checkpoint("train")
    with pytest.raises(
        TrainingError, match=rf"^{what} is not finite behind 2 epochs and 0 steps, so this state is not"
    ):
        save_state(model, optimizer, GateHistory(model, [], 0.0), job(run), TrainingPosition(2), 100)
    assert run.latest_checkpoint("train") == before
