"""Runs with pruning during training, from the first removal to the report; tiny models."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.interruption import interrupted_after_checkpoint
from helpers.toy_run import killed_in
from rich.console import Console

from prunekit.config.recipe import load
from prunekit.errors import RecipeError
from prunekit.pipeline import runner
from prunekit.pipeline.models import build_dense, build_with_plan, load_model, read_plan
from prunekit.pipeline.runner import finetune_run, run_recipe, slim_run
from prunekit.pruning.graph.groups import find_groups
from prunekit.reporting import load_run, report
from prunekit.runs.run_dir import RunDir

QUICK = [
    "backbone.options={depth: 8, width: 8}",
    "train.epochs=4",
    "train.batch_size=128",
    "train.gate_lr=0.1",
    "train.prune_every=1",
    "decay={name: l1, weight: 1e-2}",
    "slim.threshold=0.1",
    "finetune.epochs=1",
    "finetune.batch_size=128",
]
NAMES = ("dense", "slim", "finetuned")


def recipe(*overrides):
    return load("digits_resnet", [*QUICK, *overrides])


def run_it(out, *overrides, **how):
    return run_recipe(recipe(*overrides), out, Console(quiet=True), **how)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def lines(folder, stage="train"):
    found = [{k: v for k, v in line.items() if k != "seconds"} for line in RunDir.open(folder).read_metrics()]
    return [line for line in found if line["stage"] == stage]


def cuts(folder):
    return [{k: v for k, v in cut.items() if k != "seconds"} for cut in summary(folder)["progressive_pruning"]]


def same_models(a, b, *names):
    return all((a / n / "model.safetensors").read_bytes() == (b / n / "model.safetensors").read_bytes() for n in names)


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Skip the stages after fine-tuning, which take longest; one test runs them."""
    held = {name: runner.STAGE_FUNCTIONS[name] for name in ("evaluate", "export", "report")}
    with pytest.MonkeyPatch.context() as patch:
        for stage in held:
            patch.setitem(runner.STAGE_FUNCTIONS, stage, lambda *_: None)
        patch.setattr(runner, "report", lambda *_: None)
        yield held


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick):
    return run_it(tmp_path_factory.mktemp("runs") / "whole")


def test_pruning_records(whole):
    found, run = summary(whole), RunDir.open(whole)
    dense = params(build_dense(recipe()))
    assert found["dense"]["params"] == dense and found["kept"]["of"] == lines(whole)[0]["of"]
    records = found["progressive_pruning"]
    assert len(records) >= 2 and {one["epoch"] for one in records} <= {1, 2, 3}
    assert all(one["passed"] and one["max_abs_diff"] <= one["tolerance"] for one in records)
    sizes = [one["params"] for one in records]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == params(load_model(run, "dense")) < dense
    told = {line["epoch"]: line["pruned"] for line in lines(whole) if "pruned" in line}
    assert told == {one["epoch"]: {k: one[k] for k in ("channels", "params", "macs")} for one in records}
    assert found["kept"]["params_ratio"] == pytest.approx(found["slim"]["params"] / dense)
    assert f"cut {records[0]['channels']}" in (whole / "run.log").read_text()


def test_plan_is_relative_to_backbone(whole):
    run = RunDir.open(whole)
    plan = read_plan(run, "slim")
    for name in ("slim", "finetuned"):
        assert (
            params(load_model(run, name)) == params(build_with_plan(recipe(), plan)) == summary(whole)[name]["params"]
        )
    groups = find_groups(build_dense(recipe()), torch.zeros(1, 3, recipe().data.size, recipe().data.size))
    kept = sum(len(plan.kept(group)) for group in groups if group.reason is None)
    assert kept == summary(whole)["kept"]["channels"]


def test_gate_history_has_zeros_for_removed_channels(whole):
    gates = RunDir.open(whole).read_arrays("gates.npz")
    dense = dict(build_dense(recipe()).named_parameters())
    assert all(rows.shape == (4, len(dense[f"{norm}.weight"])) for norm, rows in gates.items())
    table = np.concatenate(list(gates.values()), axis=1)
    gone = (table[1:] == 0) & (table[:-1] > 0)
    assert gone.any() and (table[1:][:-1][gone[:-1]] == 0).all()
    zero = table == 0
    assert (zero[1:] | ~zero[:-1]).all()  # removed channels do not return


def plan_of(folder, name):
    return {k: v for k, v in json.loads((folder / name / "plan.json").read_text()).items() if k != "recipe_hash"}


def resumed_equals(folder, whole):
    assert same_models(folder, whole, *NAMES)
    assert lines(folder) == lines(whole) and cuts(folder) == cuts(whole)
    for name in ("gates.npz", "dense/plan.json", "layers.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    for name in ("extract", "slim", "finetuned"):
        assert plan_of(folder, name) == plan_of(whole, name)


def test_run_interrupted_after_pruning_resumes_to_same_result(whole, tmp_path):
    with interrupted_after_checkpoint(epoch=2):
        run_it(tmp_path / "run")
    run_it(tmp_path / "run", resume=True)
    resumed_equals(tmp_path / "run", whole)


def test_pruning_after_last_checkpoint_is_repeated(whole, tmp_path):
    with killed_in(4):
        run_it(tmp_path / "run", "train.checkpoint.every=2")
    run_it(tmp_path / "run", "train.checkpoint.every=2", resume=True)
    resumed_equals(tmp_path / "run", whole)


def test_run_can_be_repeated_from_any_stage(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    before = {
        name: (run / name).read_bytes() for name in ("extract/plan.json", "slim/plan.json", "slim/model.safetensors")
    }
    run_it(run, resume=True, start_from="extract")
    assert all((run / name).read_bytes() == data for name, data in before.items())
    run_it(run, resume=True, start_from="train")
    assert same_models(run, whole, *NAMES) and cuts(run) == cuts(whole)


def test_slim_run_with_another_threshold(whole, tmp_path):
    out = slim_run(whole, load(whole / "recipe.yaml", ["slim.threshold=0.3"]), tmp_path / "slim", Console(quiet=True))
    found, before = summary(out), summary(whole)
    assert found["dense"]["params"] == before["dense"]["params"] and found["kept"]["of"] == before["kept"]["of"]
    assert found["slim"]["params"] < before["slim"]["params"]
    assert params(load_model(RunDir.open(out), "slim")) == found["slim"]["params"]
    tuned = finetune_run(whole, load(whole / "recipe.yaml"), tmp_path / "tuned", Console(quiet=True))
    assert summary(tuned)["dense"]["params"] == before["dense"]["params"]
    assert params(load_model(RunDir.open(tuned), "dense")) == before["progressive_pruning"][-1]["params"]


def test_run_with_init_prunes_further(whole, tmp_path):
    out = run_it(tmp_path / "run", f"init={whole}", "train.epochs=2", "decay.weight=1e-2")
    run = RunDir.open(out)
    assert summary(out)["dense"]["params"] == summary(whole)["finetuned"]["params"]
    assert params(load_model(run, "slim")) == summary(out)["slim"]["params"]
    if "progressive_pruning" in summary(out):
        assert params(load_model(run, "dense")) == summary(out)["progressive_pruning"][-1]["params"]


def test_evaluate_export_and_report(whole, tmp_path, quick):
    run = shutil.copytree(whole, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        for stage, function in quick.items():
            patch.setitem(runner.STAGE_FUNCTIONS, stage, function)
        patch.setattr(runner, "report", report)
        run_it(run, resume=True, start_from="evaluate")
    found = summary(run)
    assert all(0 <= found[name]["metrics"]["top1"] <= 1 for name in NAMES)
    assert found["export"]["max_abs_diff"] < 1e-4
    assert (run / "report" / "index.html").exists()
    read = load_run(run)
    assert read.summary["progressive_pruning"] == found["progressive_pruning"]


def test_budget_with_pruning_during_training(tmp_path):
    options = ["target.params_ratio=0.3"]
    out = run_it(tmp_path / "run", *options)
    with interrupted_after_checkpoint(epoch=3):
        run_it(tmp_path / "broken", *options)
    run_it(tmp_path / "broken", *options, resume=True)
    assert same_models(tmp_path / "broken", out, *NAMES) and lines(tmp_path / "broken") == lines(out)
    found = summary(out)
    goal = round(0.3 * found["dense"]["params"])
    assert found["kept"]["params_ratio"] == pytest.approx(0.3, rel=0.02)
    assert found["progressive_pruning"] and all(one["params"] >= goal for one in found["progressive_pruning"])
    assert [line["budget"] for line in lines(out)] == [{"params": goal}] * 4


def test_no_dead_channels_changes_nothing(tmp_path):
    options = ["decay.weight=0", "train.epochs=2"]
    a = run_it(tmp_path / "a", *options)
    b = run_it(tmp_path / "b", *options, "train.prune_every=null")
    assert same_models(a, b, *NAMES) and lines(a) == lines(b)
    assert "progressive_pruning" not in summary(a) and not (a / "dense/plan.json").exists()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "often"])
def test_invalid_prune_every_is_refused(value):
    with pytest.raises(RecipeError, match=r"train\.prune_every") as error:
        recipe(f"train.prune_every={value}")
    assert "\n" not in str(error.value)


def test_prune_every_conflicts():
    with pytest.raises(RecipeError, match=r"finetune\.prune_every"):
        recipe("finetune.prune_every=2")
    with pytest.raises(RecipeError, match=r"train\.prune_every.*slim\.scope"):
        recipe("slim.scope=layer", "target.params_ratio=0.3")
