from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.config.schema import Training
from prunekit.errors import TrainingError
from prunekit.pruning.sparsity.dynamic_decay import NoDecay
from prunekit.runs.run_dir import RunDir
from prunekit.training.checkpoint import TrainingPosition, restore_checkpoint, save_checkpoint
from prunekit.training.gate_history import GateHistory

CPU = torch.device("cpu")


class Gradual:
    """Stands in for the gradual pruning."""

    def __init__(self, state):
        self.held, self.round = state, 0

    def state_dict(self):
        return self.held

    def load_state_dict(self, state):
        self.held, self.round = state, 1


def make_trainer(run, optimizer=torch.optim.SGD, position=None, gradual=None):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    position, ended = position or TrainingPosition(), []
    return SimpleNamespace(
        job=SimpleNamespace(stage="train", config=Training(epochs=3), run=run),
        model=model,
        optimizer=optimizer(model.parameters(), lr=1.0),
        gates=GateHistory(model, [], 0.0),
        decay=NoDecay(model, []),
        ema=None,
        ended=ended,
        gradual_pruning=gradual,
        end_decay=lambda: ended.append(run),
        position=position,
        phases=SimpleNamespace(at=lambda epoch: SimpleNamespace(steps=100)),
        global_step=100 * position.epoch + position.step,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with RunDir.start(tmp_path_factory.mktemp("runs") / "run", "name: x\n", {}) as made:
        yield made


numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=30)
@given(
    epoch=st.integers(0, 9),
    step=st.integers(1, 99),
    sums=st.tuples(numbers, numbers, numbers),
    seconds=numbers,
    best=st.none() | st.tuples(numbers, st.integers(0, 9)),
    drawn=st.integers(0, 5),
)
def test_checkpoint_within_an_epoch_restores_everything(run, epoch, step, sums, seconds, best, drawn):
    generator = torch.Generator().manual_seed(1)
    torch.rand(drawn, generator=generator)
    torch.rand(drawn)
    position = TrainingPosition(epoch, step, torch.tensor(sums, dtype=torch.float64), seconds, best)
    saved = make_trainer(run, position=position, gradual=Gradual({"value": seconds}))
    position.save_rng(generator, CPU)
    save_checkpoint(saved)
    expected = torch.rand(3, generator=generator), torch.rand(3)

    trainer = make_trainer(run, gradual=Gradual({}))
    checkpoint = run.load_checkpoint("train")
    for path in (run.path / "checkpoints").iterdir():
        path.unlink(missing_ok=True)
    restored = restore_checkpoint(trainer, checkpoint)
    assert (restored.epoch, restored.step, restored.seconds, restored.best) == (epoch, step, seconds, best)
    assert torch.equal(restored.sums, position.sums)
    assert all(map(torch.equal, trainer.model.state_dict().values(), saved.model.state_dict().values()))
    assert trainer.gradual_pruning.held == {"value": seconds} and trainer.ended and not saved.ended
    other = torch.Generator()
    torch.rand(7)
    restored.restore_rng(other, CPU)
    assert torch.equal(torch.rand(3, generator=other), expected[0]) and torch.equal(torch.rand(3), expected[1])


def test_checkpoint_between_epochs_holds_no_generators(run):
    trainer = make_trainer(run, position=TrainingPosition(1))
    save_checkpoint(trainer)
    arrays, _ = run.load_checkpoint("train")
    assert {name.partition("/")[0] for name in arrays} == {"model"}
    restored = restore_checkpoint(trainer, (arrays, {"epoch": 1}))
    assert (restored.epoch, restored.step, restored.rng_states) == (1, 0, {})


@pytest.mark.parametrize("name", ["1.running_var", "0.weight", "0/exp_avg"])
def test_checkpoint_with_a_nonfinite_number_is_not_saved(run, name):
    trainer = make_trainer(run, torch.optim.Adam, TrainingPosition(2))
    trainer.model(torch.randn(2, 3, 4, 4)).sum().backward()
    trainer.optimizer.step()
    states = enumerate(trainer.optimizer.state.values())
    moments = {f"{index}/{key}": value for index, state in states for key, value in state.items()}
    tensor = {**trainer.model.state_dict(), **moments}[name]
    tensor.view(-1)[1] = float("nan")
    before = run.latest_checkpoint("train")
    message = rf"^{name} is not finite after 2 epochs and 0 steps, so no checkpoint is saved"
    with pytest.raises(TrainingError, match=message):
        save_checkpoint(trainer)
    assert run.latest_checkpoint("train") == before
