import signal

import numpy as np
import pytest
import torch
from helpers.interruption import interrupted_after_checkpoint
from helpers.networks import small_csnet
from helpers.toy_run import killed_in
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from prunekit.config import registry
from prunekit.config.schema import Training
from prunekit.data.datasets import load_tensors
from prunekit.errors import CheckpointError, TrainingError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.runs.run_dir import RunDir
from prunekit.training.callbacks import Checkpointing
from prunekit.training.distillation import TrainingLoss
from prunekit.training.trainer import TINY, Trainer
from prunekit.training.training_job import TrainingJob

SIZE = 16


class Silent:
    """A reporter that keeps the rows of the epochs."""

    rows: list = []  # noqa: RUF012

    def start_training(self, *_):
        self.rows = []

    def log_step(self, *_): ...

    def log_epoch(self, row):
        self.rows.append(row)

    def end_training(self): ...

    def info(self, text): ...


@pytest.fixture(scope="module")
def data():
    build = registry.datasets.get("salient_shapes")
    return {split: load_tensors(build(split, size=SIZE, train=20, val=4), SIZE) for split in ("train", "val")}


def resized(size):
    """Return the training data at another size."""
    return load_tensors(registry.datasets.get("salient_shapes")("train", size=SIZE, train=20, val=4), size)


def section(**changes):
    options = {
        "epochs": 3,
        "batch_size": 6,
        "lr": 1e-3,
        "gate_lr": 1e-2,
        "optimizer": {"name": "adam", "options": {"betas": [0.9, 0.99]}},
        "schedule": {"name": "one_cycle"},
        "augment": {"name": "crop_flip", "options": {"crop": 2}},
    }
    return Training.model_validate({**options, **changes})


class Tiny(nn.Module):
    """A small model with dropout, which draws random numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU()
        self.noise, self.last = nn.Dropout(0.2), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.last(self.noise(self.act(self.norm(self.first(x)))))


def train(folder, data, *, stop_after=None, resume=False, build=small_csnet, weight=0.1, **changes):
    """Train a small CSNet in this folder; return the model and the rows of its epochs."""
    torch.manual_seed(0)
    model = build()
    groups = find_groups(model, torch.zeros(1, 3, SIZE, SIZE))
    reporter = Silent()
    with RunDir.start(folder, "name: test\n", {}, resume=resume) as run:
        job = TrainingJob(
            stage="train",
            config=section(**changes),
            task=registry.tasks.get("saliency")(),
            loss=TrainingLoss(registry.tasks.get("saliency")().loss),
            train_data=data["train"],
            val_data=data["val"],
            seed=3,
            run=run,
            reporter=reporter,
            device=torch.device("cpu"),
            threshold=1e-3,
            resized=resized,
        )
        if stop_after is not None:

            def stop(row, log_epoch=reporter.log_epoch):
                log_epoch(row)
                if row["epoch"] == stop_after:
                    raise KeyboardInterrupt

            reporter.log_epoch = stop
        Trainer(model, job, groups, DynamicWeightDecay(model, groups, weight)).fit()
    return model, reporter.rows


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_same_seed_gives_same_weights(tmp_path, data):
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
def test_resume_after_an_epoch_gives_same_weights_and_metrics(tmp_path, data, after):
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


def rows_of(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in RunDir.open(folder).read_metrics()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tiny")
    return train(folder, data, build=Tiny)[0], folder


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_resume_within_an_epoch_gives_same_weights_and_metrics(tmp_path, data, tiny, step):
    whole, folder = tiny
    with interrupted_after_checkpoint(global_step=step):
        train(tmp_path, data, build=Tiny, checkpoint={"steps": 1})
    torch.manual_seed(99)
    resumed, _ = train(tmp_path, data, build=Tiny, resume=True, checkpoint={"steps": 1})
    assert same(whole, resumed)
    assert rows_of(tmp_path) == rows_of(folder)
    assert RunDir.open(tmp_path).read_bytes("gates.npz") == RunDir.open(folder).read_bytes("gates.npz")


# 2, 2, 3 and 3 steps, at 8×8 and at 16×16.
PROGRESSIVE = {
    "epochs": 4,
    "ema": 0.9,
    "progressive": {"sizes": [8, SIZE], "batch_sizes": [9, 6], "strengths": [0, 1]},
    "checkpoint": {"steps": 1},
}


@pytest.fixture
def seen(monkeypatch):
    """The shape of the images of each step, and the strength of their augmentation."""
    shapes, crop_flip = [], registry.augmentations.get("crop_flip")

    def augment(images, targets, sizes, generator, **options):
        shapes.append((*images.shape, options["strength"]))
        return crop_flip(images, targets, sizes, generator, **options)

    monkeypatch.setattr(registry.augmentations, "get", lambda name: augment)
    return shapes


def test_sizes_batches_and_strength_change_with_the_epochs(tmp_path, data, seen):
    _, rows = train(tmp_path, data, **PROGRESSIVE)
    assert seen == [(9, 3, 8, 8, 0.0)] * 4 + [(6, 3, SIZE, SIZE, 1.0)] * 6
    assert [(row["size"], row["step"]) for row in rows] == [(8, 2), (8, 4), (SIZE, 7), (SIZE, 10)]
    assert checkpoints(tmp_path)[-1] == "train-0010"


def test_the_schedule_counts_epochs(tmp_path, data, monkeypatch):
    shares = []
    monkeypatch.setattr(registry.schedules, "get", lambda name: lambda share: shares.append(share) or 1.0)
    train(tmp_path, data, **PROGRESSIVE)
    assert shares == pytest.approx([0, 1 / 8, 1 / 4, 3 / 8, *(1 / 2 + n / 12 for n in range(6))])


def test_strength_of_the_recipe_is_multiplied(tmp_path, data, seen):
    augment = {"name": "crop_flip", "options": {"crop": 2, "strength": 0.5}}
    train(tmp_path, data, **{**PROGRESSIVE, "augment": augment, "epochs": 2})
    assert [shape[-1] for shape in seen] == [0.0] * 2 + [0.5] * 3


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_resume_across_a_change_of_size_gives_same_weights_and_metrics(tmp_path, data, step):
    whole, _ = train(tmp_path / "whole", data, build=Tiny, **PROGRESSIVE)
    with interrupted_after_checkpoint(global_step=step):
        train(tmp_path / "broken", data, build=Tiny, **PROGRESSIVE)
    torch.manual_seed(99)
    resumed, _ = train(tmp_path / "broken", data, build=Tiny, resume=True, **PROGRESSIVE)
    assert same(whole, resumed)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")


class Viewing(Tiny):
    """Refuses channels-last, after a norm has already updated its statistics."""

    def __init__(self):
        super().__init__()
        self.next = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.next(self.act(self.norm(self.first(x))))
        return self.last(self.noise(y.view(len(y), -1).view(y.shape)))


def test_resume_of_a_model_that_refuses_channels_last(tmp_path, data):
    whole, _ = train(tmp_path / "whole", data, build=Viewing)
    with interrupted_after_checkpoint(global_step=4):
        train(tmp_path / "broken", data, build=Viewing, checkpoint={"steps": 2})
    resumed, _ = train(tmp_path / "broken", data, build=Viewing, resume=True, checkpoint={"steps": 2})
    assert same(whole, resumed)


def checkpoints(folder):
    return sorted(path.stem for path in (folder / "checkpoints").glob("train-*.json"))


@pytest.mark.parametrize(
    "section, kept",
    [
        ({}, {6, 9}),
        ({"every": 2}, {6, 9}),
        ({"every": 2, "keep": 1}, {9}),
        ({"steps": 4, "keep": 9}, {3, 4, 6, 8, 9}),
        ({"minutes": 1e-9, "keep": 4}, {6, 7, 8, 9}),
        ({"every": 3, "minutes": 1e9, "keep": 9}, {9}),
    ],
)
def test_when_checkpoints_are_saved_and_which_are_kept(tmp_path, data, section, kept):
    train(tmp_path, data, build=Tiny, checkpoint={"best": False, **section})
    assert checkpoints(tmp_path) == [f"train-{step:04d}" for step in sorted(kept)]


@pytest.mark.parametrize("lower", [False, True])
def test_best_checkpoint_is_kept(tmp_path, data, monkeypatch, lower):
    task = type(registry.tasks.get("saliency")())
    figures = iter([0.5, 0.9, 0.7, 0.6, 0.8, 0.55])
    monkeypatch.setattr(task, "validate", lambda *_: {"max_f": next(figures)})
    monkeypatch.setattr(task, "lower_is_better", frozenset({"max_f"} if lower else ()))
    with interrupted_after_checkpoint(global_step=12):
        train(tmp_path, data, build=Tiny, epochs=6, checkpoint={"keep": 1})
    train(tmp_path, data, build=Tiny, epochs=6, checkpoint={"keep": 1}, resume=True)
    assert checkpoints(tmp_path) == [f"train-{3 if lower else 6:04d}", "train-0018"]


def test_first_interrupt_saves_a_checkpoint_and_second_stops_at_once(tmp_path, data, capfd):
    whole, _ = train(tmp_path / "whole", data, build=Tiny)
    before = signal.getsignal(signal.SIGTERM)
    for number, presses in (("once", 1), ("twice", 2)):
        steps = []

        def press(*_, presses=presses, steps=steps):
            steps.append(1)
            if len(steps) == 5:
                for _ in range(presses):
                    signal.raise_signal(signal.SIGTERM if presses == 1 else signal.SIGINT)

        hook = register_optimizer_step_post_hook(press)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / number, data, build=Tiny)
        hook.remove()
        assert len(steps) == 5
        assert checkpoints(tmp_path / number) == ["train-0003", "train-0005"][: 3 - presses]
        assert RunDir.open(tmp_path / number).status == "interrupted"
        resumed, _ = train(tmp_path / number, data, build=Tiny, resume=True)
        assert same(whole, resumed) and rows_of(tmp_path / number) == rows_of(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) is before and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "interrupt again to stop at once" in capfd.readouterr().err


def test_interrupt_after_the_last_step_interrupts_the_run(tmp_path, data, monkeypatch):
    save = Checkpointing.save

    def save_and_signal(callback, trainer):
        save(callback, trainer)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "save", save_and_signal)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, data, build=Tiny, epochs=1)
    assert RunDir.open(tmp_path).status == "interrupted" and checkpoints(tmp_path) == ["train-0003"]


def test_resume_from_a_checkpoint_of_an_early_version(tmp_path, data):
    """They were numbered by epoch and held nothing else beside the tensors."""
    whole, _ = train(tmp_path / "whole", data, build=Tiny)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "old", data, build=Tiny, stop_after=2)
    run = RunDir.open(tmp_path / "old", write=True)
    tensors, _ = run.load_checkpoint("train")
    for path in (tmp_path / "old" / "checkpoints").iterdir():
        path.unlink()
    run.save_checkpoint("train", 2, tensors, {"epoch": 2}, keep=2)
    run.close()
    resumed, _ = train(tmp_path / "old", data, build=Tiny, resume=True)
    assert same(whole, resumed) and rows_of(tmp_path / "old") == rows_of(tmp_path / "whole")


def test_resume_with_other_data_raises(tmp_path, data):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data, build=Tiny, stop_after=1)
    with pytest.raises(CheckpointError, match=r"3 steps an epoch, and the data now give 2; .*--from train"):
        train(tmp_path, data, build=Tiny, resume=True, batch_size=10)


class Counting(torch.optim.SGD):
    """Keeps a counter for each parameter and one in each parameter group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["walked"] = group.get("walked", 0) + 1
            for parameter in group["params"]:
                count = self.state[parameter].setdefault("count", 0)
                parameter.data.mul_(1 + 1e-4 * group["walked"] + 1e-5 * count)
                self.state[parameter]["count"] = self.keep(count + 1)
        super().step()

    @staticmethod
    def keep(count):
        return count


def test_checkpoint_holds_the_numbers_of_an_optimizer(tmp_path, data, monkeypatch):
    def build(groups, **_):
        return Counting([group.settings(0, 1, 1) for group in groups], momentum=0.9)

    monkeypatch.setattr(registry.optimizers, "get", lambda name: build)
    whole, _ = train(tmp_path / "whole", data, build=Tiny)
    with interrupted_after_checkpoint(global_step=4):
        train(tmp_path / "broken", data, build=Tiny, checkpoint={"steps": 2})
    resumed, _ = train(tmp_path / "broken", data, build=Tiny, resume=True, checkpoint={"steps": 2})
    assert same(whole, resumed)
    monkeypatch.setattr(Counting, "keep", staticmethod(bytes))
    with pytest.raises(TrainingError, match=r"the optimizer adam keeps a bytes \(count\)"):
        train(tmp_path / "bytes", data, build=Tiny, checkpoint={"steps": 1})


def test_interrupt_before_a_row_is_written_leaves_no_gap(tmp_path, data):
    with killed_in(2):
        train(tmp_path / "run", data)
    train(tmp_path / "run", data, resume=True)
    assert [line["epoch"] for line in RunDir.open(tmp_path / "run").read_metrics()] == [1, 2, 3]


def test_resume_drops_rows_after_the_checkpoint(tmp_path, data):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", data, stop_after=3, checkpoint={"every": 2})
    train(tmp_path / "run", data, resume=True, checkpoint={"every": 2})
    assert [line["epoch"] for line in RunDir.open(tmp_path / "run").read_metrics()] == [1, 2, 3]


def test_nonfinite_penalty_stops_the_run(tmp_path, data):
    with pytest.raises(TrainingError, match="the penalty is nan at epoch 1, step 1"):
        train(tmp_path / "run", data, weight=float("nan"))
    assert RunDir.open(tmp_path / "run").status == "failed"


def test_checkpoint_of_another_model_raises(tmp_path, data):
    train(tmp_path / "run", data, epochs=1)
    run = RunDir.open(tmp_path / "run", write=True)
    tensors, state = run.load_checkpoint("train")
    tensors.pop("model/classifier.bias")
    run.save_checkpoint("train", 3, tensors, state, keep=1)
    run.close()
    with pytest.raises(CheckpointError, match=r"does not fit the model .*--from train"):
        train(tmp_path / "run", data, resume=True)


def test_tiny_weights_are_set_to_zero(tmp_path, data):
    torch.manual_seed(0)
    model, _ = train(tmp_path / "run", data, epochs=1)
    for parameter in model.parameters():
        small = parameter[parameter != 0].abs()
        assert not len(small) or small.min() >= TINY


@pytest.mark.slow
def test_sparse_training_lowers_gates_below_the_threshold(tmp_path, data):
    _, lines = train(tmp_path / "run", data, epochs=30, weight=50.0, gate_lr=5e-2)
    # A gate below the threshold may rise above it an epoch later.
    assert min(line["alive"] for line in lines[-10:]) < lines[0]["alive"]
    assert lines[-1]["penalty"] < 0.1 * lines[0]["penalty"]


def test_validation_every_few_epochs_and_after_the_last(tmp_path, data):
    _, rows = train(tmp_path, data, build=Tiny, epochs=5, validate_every=2)
    assert [row["epoch"] for row in rows if row["metrics"]] == [2, 4, 5]
