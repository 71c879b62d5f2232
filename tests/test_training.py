import numpy as np
import pytest
import torch

from prunekit import registry
from prunekit.backbones.csnet import csnet
from prunekit.data.pairs import load_tensors
from prunekit.errors import CheckpointError, TrainingError
from prunekit.job import Job
from prunekit.pruning.decay import DynamicWeightDecay
from prunekit.pruning.groups import find_groups
from prunekit.rundir import RunDir
from prunekit.schema import Training
from prunekit.training import FLUSH, fit

SIZE = 16


class Silent:
    lines: list = []  # noqa: RUF012

    def start(self, *_):
        self.lines = []

    def step(self, *_): ...

    def epoch(self, line):
        self.lines.append(line)

    def stop(self): ...

    def say(self, text): ...


@pytest.fixture(scope="module")
def data():
    build = registry.datasets.get("salient_shapes")
    return {split: load_tensors(build(split, size=SIZE, train=20, val=4), SIZE) for split in ("train", "val")}


def section(**changes):
    options = {
        "epochs": 3,
        "batch_size": 6,
        "lr": 1e-3,
        "gate_lr": 1e-2,
        "optimizer": {"name": "adam", "options": {"betas": [0.9, 0.99]}},
        "schedule": "one_cycle",
        "augment": {"name": "crop_flip", "options": {"crop": 2}},
    }
    return Training.model_validate({**options, **changes})


def train(folder, data, *, stop_after=None, resume=False, monkeypatch=None, weight=0.1, **changes):
    """Train a small CSNet in this folder; its weights as they are at the end."""
    torch.manual_seed(0)
    model = csnet(width=10)
    groups = find_groups(model, torch.zeros(1, 3, SIZE, SIZE))
    reporter = Silent()
    with RunDir.start(folder, "name: test\n", {}, resume=resume) as run:
        job = Job(
            stage="train",
            section=section(**changes),
            task=registry.tasks.get("saliency")(),
            train=data["train"],
            val=data["val"],
            seed=3,
            run=run,
            reporter=reporter,
            device=torch.device("cpu"),
            threshold=1e-3,
        )
        if stop_after is not None:

            def stop(line, held=reporter.epoch):
                held(line)
                if line["epoch"] == stop_after:
                    raise KeyboardInterrupt

            reporter.epoch = stop
        fit(model, job, groups, DynamicWeightDecay(model, groups, weight))
    return model, reporter.lines


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_same_seed_gives_the_same_weights(tmp_path, data):
    first, lines = train(tmp_path / "a", data)
    second, _ = train(tmp_path / "b", data)
    assert same(first, second)
    assert [line["epoch"] for line in lines] == [1, 2, 3] and lines[-1]["step"] == 9
    assert set(lines[0]) == {
        "stage",
        "epoch",
        "step",
        "loss",
        "penalty",
        "lambda",
        "lr",
        "alive",
        "of",
        "metrics",
        "seconds",
    }


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path, data, after):
    whole, lines = train(tmp_path / "whole", data)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", data, stop_after=after)
    resumed, _ = train(tmp_path / "broken", data, resume=True)
    assert same(whole, resumed)
    runs = [RunDir.open(tmp_path / name) for name in ("whole", "broken")]
    kept = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()] for run in runs]
    assert kept[0] == kept[1] and len(kept[0]) == len(lines)
    gates = [run.read_arrays("gates.npz") for run in runs]
    assert all(np.array_equal(gates[0][name], gates[1][name]) for name in gates[0])
    assert next(iter(gates[0].values())).shape[0] == 3


def test_a_stop_beside_the_writing_of_a_state_leaves_no_gap(tmp_path, data, monkeypatch):
    append = RunDir.append_metrics

    def stopped(run, line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt
        append(run, line)

    monkeypatch.setattr(RunDir, "append_metrics", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", data)
    monkeypatch.setattr(RunDir, "append_metrics", append)
    train(tmp_path / "run", data, resume=True)
    assert [line["epoch"] for line in RunDir.open(tmp_path / "run").read_metrics()] == [1, 2, 3]


def test_resuming_from_an_older_state_forgets_the_lines_after_it(tmp_path, data):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", data, stop_after=3, checkpoint={"every": 2})
    train(tmp_path / "run", data, resume=True, checkpoint={"every": 2})
    assert [line["epoch"] for line in RunDir.open(tmp_path / "run").read_metrics()] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    with pytest.raises(TrainingError, match="the penalty is nan at epoch 1, step 1"):
        train(tmp_path / "run", data, weight=float("nan"))
    assert RunDir.open(tmp_path / "run").status == "failed"


def test_a_training_state_of_another_model_is_refused(tmp_path, data):
    train(tmp_path / "run", data, epochs=1)
    run = RunDir.open(tmp_path / "run", write=True)
    tensors, state = run.load_checkpoint("train")
    tensors.pop("model/classifier.bias")
    run.save_checkpoint("train", 1, tensors, state, keep=1)
    run.close()
    with pytest.raises(CheckpointError, match=r"does not fit the model .*--from train"):
        train(tmp_path / "run", data, resume=True)


def test_no_parameter_is_left_on_its_way_to_zero(tmp_path, data):
    torch.manual_seed(0)
    model, _ = train(tmp_path / "run", data, epochs=1)
    for parameter in model.parameters():
        small = parameter[parameter != 0].abs()
        assert not len(small) or small.min() >= FLUSH


def test_sparse_training_kills_gates(tmp_path, data):
    _, lines = train(tmp_path / "run", data, epochs=30, weight=50.0, gate_lr=5e-2)
    # One that is below the threshold may be back above it an epoch later.
    assert min(line["alive"] for line in lines[-10:]) < lines[0]["alive"]
    assert lines[-1]["penalty"] < 0.1 * lines[0]["penalty"]
