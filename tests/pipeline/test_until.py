"""``run --until``: a run that stops before a stage continues as if it had not stopped."""

import pytest
from helpers.small_run import skip_export
from helpers.toy_run import outcome, quiet

from prunekit.config.recipe import load
from prunekit.errors import RecipeError, RunFolderError
from prunekit.pipeline.runner import run_recipe
from prunekit.runs.run_dir import RunDir

SHORT = [
    "backbone.options={depth: 8, width: 4}",
    "train.epochs=4",
    "train.batch_size=256",
    "finetune.epochs=1",
    "finetune.batch_size=512",
    "export.onnx=false",
]
AT_ONCE = ["train.gradual_pruning.start=null"]


def recipe(*overrides):
    return load("digits_resnet", [*SHORT, *overrides])


@pytest.fixture(autouse=True)
def short(monkeypatch):
    skip_export(monkeypatch)


@pytest.mark.parametrize("start", [0.25, 0.4], ids=["between epochs", "within an epoch"])
def test_target_may_change_until_gradual_pruning_begins(tmp_path, start):
    begins, ends = f"train.gradual_pruning.start={start}", "train.gradual_pruning.end=0.75"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_recipe(recipe(begins, ends, "target.params_ratio=0.5"), whole, quiet())
    run_recipe(recipe(begins, "target.params_ratio=0.3"), parts, quiet(), until="gradual_pruning")
    stopped = RunDir.open(parts)
    steps = stopped.latest_checkpoint("train")
    # It is there already.
    run_recipe(recipe(begins, "target.params_ratio=0.4"), parts, quiet(), resume=True, until="gradual_pruning")
    assert stopped.latest_checkpoint("train") == steps
    assert stopped.status == "interrupted" and not stopped.done
    assert stopped.load_checkpoint("train")[1]["gradual_pruning"]["round"] == 0
    run_recipe(recipe(begins, ends, "target.params_ratio=0.5"), parts, quiet(), resume=True)
    assert outcome(parts) == outcome(whole)


def test_target_cannot_change_after_gradual_pruning_has_begun(tmp_path):
    run_recipe(recipe(), tmp_path / "run", quiet(), until="extract")
    assert RunDir.open(tmp_path / "run").done == ["train"]
    with pytest.raises(RunFolderError, match=r"target\.params_ratio cannot change now; use the old value, or --over"):
        run_recipe(recipe("target.params_ratio=0.5"), tmp_path / "run", quiet(), resume=True)


def test_stops_before_a_stage(tmp_path):
    run_recipe(recipe(*AT_ONCE), tmp_path / "run", quiet(), until="slim")
    run = RunDir.open(tmp_path / "run")
    assert run.done == ["train", "extract"] and run.status == "interrupted" and not run.has("report")
    run_recipe(recipe(*AT_ONCE), tmp_path / "run", quiet(), resume=True)
    assert RunDir.open(tmp_path / "run").status == "complete"


@pytest.mark.parametrize(
    ("until", "overrides", "message"),
    [
        ("slimm", [], r"--until slimm: no such stage, did you mean 'slim'\? \(extract, slim, .*, gradual_pruning\)"),
        ("train", [], r"--until train: no such stage"),
        ("gradual_pruning", AT_ONCE, r"--until gradual_pruning: needs train\.gradual_pruning\.start above 0"),
    ],
)
def test_invalid(tmp_path, until, overrides, message):
    with pytest.raises(RecipeError, match=message):
        run_recipe(recipe(*overrides), tmp_path / "run", quiet(), until=until)
    assert not (tmp_path / "run").exists()


def test_from_must_lie_before_until(tmp_path):
    with pytest.raises(RecipeError, match=r"--from extract --until gradual_pruning: nothing lies between them"):
        run_recipe(recipe(), tmp_path / "run", quiet(), resume=True, start_from="extract", until="gradual_pruning")
