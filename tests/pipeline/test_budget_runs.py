"""Runs with a budget: λ control, plans that fit, rounds with fine-tuning between; tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.interruption import interrupted_after_checkpoint
from helpers.small_run import skip_rehearsal
from rich.console import Console

from prunekit.config.recipe import load
from prunekit.errors import PlanError, RecipeError
from prunekit.pipeline import runner
from prunekit.pipeline.models import load_model
from prunekit.pipeline.rehearsal import rehearse
from prunekit.pipeline.runner import run_recipe, slim_run
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.importance import gate
from prunekit.reporting import load_run
from prunekit.runs.run_dir import RunDir

QUICK = [
    "train.gradual_pruning.start=null",
    "backbone.options={depth: 8, width: 8}",
    "train.epochs=3",
    "train.batch_size=128",
    "train.gate_lr=0.1",
    "decay={name: l1, weight: 1e-3}",
    "slim.threshold=0.1",
    "finetune.epochs=1",
    "finetune.batch_size=128",
    "target.params_ratio=0.3",
]
STEPS = ["slim.steps=3", "slim.importance=taylor", "target.params_ratio=null", "target.macs_ratio=0.25"]


def recipe(*overrides):
    return load("digits_resnet", [*QUICK, *overrides])


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Skip the rehearsal and the stages after fine-tuning, which take longest and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("evaluate", "export", "report"):
            patch.setitem(runner.STAGE_FUNCTIONS, stage, lambda *_: None)
        patch.setattr("prunekit.reporting.report", lambda *_: None)
        skip_rehearsal(patch)
        yield


def run_it(out, *overrides, **how):
    return run_recipe(recipe(*overrides), out, Console(quiet=True), **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick):
    return run_it(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def lines(folder, stage=None):
    found = [{k: v for k, v in line.items() if k != "seconds"} for line in RunDir.open(folder).read_metrics()]
    return [line for line in found if stage in (None, line["stage"])]


def log(folder):
    return (folder / "run.log").read_text()


def same_models(a, b, *names):
    return all((a / n / "model.safetensors").read_bytes() == (b / n / "model.safetensors").read_bytes() for n in names)


def test_slim_model_meets_budget(whole):
    found = summary(whole)
    assert found["kept"]["params_ratio"] == pytest.approx(0.3, rel=0.02)
    assert found["equivalence"]["passed"]
    said = log(whole)
    assert "channels are removed for" in said and "budget" in said


def test_summary_has_the_cut_that_meets_the_target(whole):
    run, dense = RunDir.open(whole), load_model(RunDir.open(whole), "dense")
    groups = find_groups(dense, torch.zeros(1, 3, 8, 8))
    scores, kept = gate(dense, groups), json.loads((whole / "slim/plan.json").read_text())["groups"]
    removed = [score for name, own in scores.items() for i, score in enumerate(own) if i not in kept.get(name, [])]
    assert run.read_json("summary.json")["kept"]["cut"] == max(removed) != 0.1
    assert load_run(whole).summary["kept"]["cut"] == max(removed)


@pytest.mark.parametrize("after", [1, 2])
def test_resumed_training_with_budget_equals_uninterrupted_one(whole, tmp_path, monkeypatch, after):
    with interrupted_after_checkpoint(epoch=after):
        run_it(tmp_path / "run")
    run_it(tmp_path / "run", resume=True)
    assert same_models(tmp_path / "run", whole, "dense", "slim", "finetuned")
    assert lines(tmp_path / "run") == lines(whole)


GRADUAL = ["train.gradual_pruning={start: 0.3, end: 0.7}", "train.ema=0.9", "finetune.epochs=0"]


def test_gradual_pruning_leaves_nothing_to_lose(tmp_path):
    folder = run_it(tmp_path / "run", *GRADUAL)
    found, dense = summary(folder), load_model(RunDir.open(folder), "dense")
    assert 0.294 <= found["kept"]["params_ratio"] <= 0.3 and found["kept"]["cut"] == 0.0
    assert found["drift"]["max_abs_diff"] <= 1e-5
    assert found["equivalence"]["passed"] and not found["equivalence"]["given_back"]
    removed = sum(
        int((gates == 0).sum()) for gates in gate(dense, find_groups(dense, torch.zeros(1, 3, 8, 8))).values()
    )
    assert removed == found["kept"]["of"] - found["kept"]["channels"]
    # The decay ends with the choice.
    assert [bool(line["lambda"]) for line in lines(folder, "train")] == [False, False, False]
    with interrupted_after_checkpoint(epoch=1):
        run_it(tmp_path / "again", *GRADUAL)
    run_it(tmp_path / "again", *GRADUAL, resume=True)
    assert same_models(tmp_path / "again", folder, "dense", "slim")
    assert lines(tmp_path / "again") == lines(folder)


@pytest.mark.slow
def test_repeated_slimming_gives_same_result(run, whole):
    run_it(run, resume=True, start_from="extract")
    assert (run / "slim/plan.json").read_bytes() == (whole / "slim/plan.json").read_bytes()
    assert same_models(run, whole, "slim", "finetuned")


@pytest.mark.parametrize(
    "changes",
    [
        ["target.params_ratio=null", "target.macs=120k"],
        ["target.params_ratio=0.5", "slim.importance=magnitude", "slim.scope=layer"],
        ["target.params_ratio=0.5", "slim.exact=true", "slim.min_channels=2"],
        ["target.params_ratio=0.4", "slim.round_to=4", "slim.ignored_layers=[stage1.*]"],
        ["target.params_ratio=0.4", "slim.importance=random"],
    ],
)
def test_slim_run_with_another_budget(whole, tmp_path, changes):
    wanted = load(whole / "recipe.yaml", changes)
    out = slim_run(whole, wanted, tmp_path / "slim", Console(quiet=True))
    found, asked = summary(out), {k: v for k, v in wanted.target.model_dump().items() if v is not None}
    ((key, goal),) = asked.items()
    real = found["kept"][key] if "ratio" in key else found["slim"][key]
    plan = json.loads((out / "slim/plan.json").read_text())
    assert real == pytest.approx(goal, rel=0.02) or f"{'below' if real < goal else 'above'} the budget" in log(out)
    assert all(note in log(out) for note in plan["notes"])
    # Only where all gates are ranked together is there one cut.
    assert ("cut" in found["kept"]) == (wanted.slim.importance.name == "gate")
    if wanted.slim.ignored_layers:
        assert any("ignored_layers keeps" in note for note in plan["notes"])


def test_rounds_with_finetuning_between(whole, tmp_path):
    wanted = load(whole / "recipe.yaml", STEPS)
    out = slim_run(whole, wanted, tmp_path / "steps", Console(quiet=True))
    found = summary(out)
    assert found["kept"]["macs_ratio"] == pytest.approx(0.25, rel=0.02) and "cut" not in found["kept"]
    rounds = found["equivalence"]["steps"]
    ratios = [one["macs"] / found["dense"]["macs"] for one in rounds]
    assert ratios == pytest.approx([0.25 ** (k / 3) for k in (1, 2, 3)], rel=0.025)
    assert all(one["passed"] and one["max_abs_diff"] <= one["tolerance"] for one in rounds)
    assert [line["stage"] for line in lines(out)] == ["step1", "step2"]
    # The plan, applied to the dense model, gives the slim one.
    assert sum(p.numel() for p in load_model(RunDir.open(out), "slim").parameters()) == found["slim"]["params"]
    assert found["drift"]["max_abs_diff"] > 0


@pytest.mark.slow
def test_interrupted_rounds_resume_to_same_result(tmp_path, monkeypatch):
    steps = ["slim.steps=3", "train.epochs=1", "finetune.epochs=2"]
    run_it(tmp_path / "whole", *steps)
    with interrupted_after_checkpoint("step2", epoch=1):
        run_it(tmp_path / "broken", *steps)
    run_it(tmp_path / "broken", *steps, resume=True)
    assert same_models(tmp_path / "broken", tmp_path / "whole", "slim", "finetuned")
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert summary(tmp_path / "broken")["equivalence"] == summary(tmp_path / "whole")["equivalence"]
    # Restarting the stage trains between the rounds again.
    run_it(tmp_path / "broken", *steps, resume=True, start_from="slim")
    assert same_models(tmp_path / "broken", tmp_path / "whole", "slim", "finetuned")
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_unreachable_budget_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.pipeline.preflight.rehearse", rehearse)
    with pytest.raises(
        PlanError, match=r"budget of 50 params cannot be met; choose one between [\d,]+ and [\d,]+ params"
    ):
        run_it(tmp_path / "run", "target.params_ratio=null", "target.params=50")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (
            "slim.importance=magnitude",
            r"slim\.importance: .*'magnitude' ranks channels .* add target\.params",
        ),
        ("slim.steps=2", r"slim\.steps: 2 steps need a target; add target\.params"),
        ("slim.scope=layer", r"slim\.scope: 'layer' needs a target; add target\.params"),
        ("slim.cost_power=1", r"slim\.cost_power: costs are shares of a target's measure; add target\.params"),
        ("train.gradual_pruning.rounds=2", r"train\.gradual_pruning\.rounds: several rounds need a target"),
    ],
)
def test_settings_that_need_a_target(change, words):
    with pytest.raises(RecipeError, match=words):
        recipe("target.params_ratio=null", change)
    recipe(change)


@pytest.mark.parametrize(
    "changes, words",
    [
        (["train.gradual_pruning.start=0.8"], r"gradual_pruning\.end: 0\.5 is not above"),
        (["train.gradual_pruning.start=0.2", "slim.steps=2"], r"slim\.steps: gradual pruning reaches the target"),
        (["slim.cost_power=1", "slim.scope=layer"], r"slim\.cost_power: costs compare layers, and slim\.scope=layer"),
    ],
)
def test_settings_that_conflict(changes, words):
    with pytest.raises(RecipeError, match=words):
        recipe(*changes)
