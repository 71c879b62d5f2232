import sys

import pytest
from helpers.small_run import BY_THRESHOLD
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from tensorboard.summary.writer import event_file_writer

from prunekit.config.recipe import load
from prunekit.errors import CheckpointError, RecipeError
from prunekit.pipeline.runner import run_recipe
from prunekit.runs.run_dir import RunDir
from prunekit.training.trackers import FOLDER, check_tracker, flatten, scalars, track

QUICK = [
    *BY_THRESHOLD,
    "backbone.options={depth: 8, width: 4}",
    "train.epochs=3",
    "train.batch_size=128",
    "finetune.epochs=2",
    "finetune.batch_size=128",
    "slim.threshold=0.3",
    "decay.weight=0.5",
    "export.onnx=false",
    "log=tensorboard",
]


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """Files of one second are read in the order of their names, in which 9 comes after 10."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def recipe(*overrides):
    return load("digits_resnet", [*QUICK, *overrides])


def line(stage, epoch, loss=1.0, **more):
    return {
        "stage": stage,
        "epoch": epoch,
        "step": 9,
        "loss": loss,
        "alive": 7,
        "of": 9,
        "metrics": {"mae": 0.5},
        **more,
    }


def read(folder):
    found = EventAccumulator(str(folder / FOLDER))
    found.Reload()
    return found


def series(folder, tag):
    return [(event.step, round(event.value, 4)) for event in read(folder).Scalars(tag)]


def test_row_becomes_scalars():
    given = line("step1", 2, **{"lambda": 0.5})
    assert scalars(given) == {
        "step1/loss": 1.0,
        "step1/alive": 7.0,
        "step1/metrics/mae": 0.5,
        "step1/lambda": 0.5,
    }


def test_flatten_recipe():
    assert flatten({"a": {"b": {"c": [0.5, "x"]}, "d": None}, "e": False}) == {"a.b.c": '[0.5, "x"]', "e": False}


def test_epochs_are_counted_over_all_trainings(tmp_path):
    given = recipe("slim.steps=2", "target.params_ratio=0.5")
    for stage, count in (("train", 3), ("step1", 2), ("finetune", 2)):
        with track(given, tmp_path, stage, 0) as take:
            for epoch in range(1, count + 1):
                take(line(stage, epoch, loss=1 / epoch))
    assert series(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert series(tmp_path, "step1/loss") == [(4, 1.0), (5, 0.5)]
    assert series(tmp_path, "finetune/loss") == [(6, 1.0), (7, 0.5)]


def test_resume_purges_repeated_epochs(tmp_path):
    with track(recipe(), tmp_path, "train", 0) as take:
        for epoch in (1, 2, 3):
            take(line("train", epoch))
    with track(recipe(), tmp_path, "finetune", 0) as take:
        take(line("finetune", 1))
    # As after a kill: the newest checkpoint is after the first epoch.
    with track(recipe(), tmp_path, "train", 1) as take:
        take(line("train", 2, loss=2.0))
    assert series(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert series(tmp_path, "finetune/loss") == [], "it comes after the repeated epochs"
    with track(recipe(), tmp_path, "train", 2):
        pass
    assert series(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_rows_are_flushed_at_once(tmp_path):
    with track(recipe(), tmp_path, "train", 0) as take:
        take(line("train", 1))
        assert series(tmp_path, "train/loss") == [(1, 1.0)]


def test_recipe_is_logged_as_hyperparameters(tmp_path):
    with track(recipe(), tmp_path, "train", 0):
        pass
    (content,) = read(tmp_path).PluginTagToContent("hparams").values()
    held = parse_session_start_info_plugin_data(content).hparams
    assert SESSION_START_INFO_TAG in read(tmp_path).PluginTagToContent("hparams")
    assert held["train.lr"].number_value == 4e-3 and held["backbone.name"].string_value == "resnet"
    assert held["train.optimizer.options.betas"].string_value == "[0.9, 0.99]" and "init" not in held
    assert held["backbone.options.width"].number_value == 4
    assert not [path for path in (tmp_path / FOLDER).iterdir() if path.is_dir()], "in the run itself"


def test_log_none_writes_nothing(tmp_path):
    with track(recipe("log=none"), tmp_path, "train", 0) as take:
        take(line("train", 1))
    assert not list(tmp_path.iterdir())


def test_write_error_raises(tmp_path):
    (tmp_path / FOLDER).write_text("in the way")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*tensorboard: .*--resume"),
        track(recipe(), tmp_path, "train", 0),
    ):
        pass


def test_interrupted_run_is_one_series(tmp_path, monkeypatch):
    from prunekit.utils.progress import Reporter

    out, epoch = tmp_path / "run", Reporter.log_epoch

    def interrupted(reporter, line):
        epoch(reporter, line)
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    # Interrupt both trainings after their second epoch.
    monkeypatch.setattr(Reporter, "log_epoch", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(), out, Console(quiet=True), resume=True)
    monkeypatch.setattr(Reporter, "log_epoch", epoch)
    monkeypatch.setattr("prunekit.reporting.report", lambda *_, **__: None)
    run_recipe(recipe(), out, Console(quiet=True), resume=True)
    lines = RunDir.open(out).read_metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3, 1, 2]
    for stage, before in (("train", 0), ("finetune", 3)):
        for name in ("loss", "penalty", "lambda", "lr", "alive"):
            wanted = [(before + held["epoch"], pytest.approx(held[name])) for held in lines if held["stage"] == stage]
            assert [(e.step, e.value) for e in read(out).Scalars(f"{stage}/{name}")] == wanted
        assert len(read(out).Scalars(f"{stage}/metrics/top1")) == len(wanted)


def test_missing_package_raises_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        RecipeError, match=r'log: tensorboard .*; pip install "prunekit\[tensorboard\]", or set log: none'
    ):
        run_recipe(recipe(), tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()
    check_tracker(recipe("log=none"))


def test_unknown_tracker_raises():
    with pytest.raises(RecipeError, match=r"log"):
        recipe("log=wandb")
