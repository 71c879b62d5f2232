"""Runs with a baseline, EMA, distillation, or the layout of another run; tiny models."""

import json

import pytest
from helpers.interruption import interrupted_after_checkpoint
from helpers.marks import slow
from helpers.toy_run import outcome, quiet, shorten, toy_recipe, write_photos

from prunekit.errors import RecipeError
from prunekit.pipeline.models import build_dense, build_with_plan, load_model, read_plan, read_recipe
from prunekit.pipeline.runner import finetune_run, run_recipe, slim_run
from prunekit.reporting import load_run
from prunekit.runs.run_dir import RunDir

CUTTING = ("train.epochs=3", "train.gate_lr=0.3")
ALL = ("baseline=true", "train.ema=0.9", "finetune.ema=0.9", "finetune.distill={weight: 0.5, teacher: baseline}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def run_it(photos):
    def run(out, *overrides, **how):
        return run_recipe(toy_recipe(photos, *CUTTING, *overrides), out, quiet(), **how)

    return run


@pytest.fixture(scope="module")
def plain(run_it, tmp_path_factory):
    return run_it(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def whole(run_it, tmp_path_factory):
    return run_it(tmp_path_factory.mktemp("whole") / "run", *ALL)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def weights(folder, name):
    return (folder / name / "model.safetensors").read_bytes()


def test_baseline_has_same_schedule_without_decay(run_it, plain, tmp_path):
    out = run_it(tmp_path / "run", "baseline=true")
    assert [weights(out, name) for name in ("dense", "slim", "finetuned")] == [
        weights(plain, name) for name in ("dense", "slim", "finetuned")
    ]
    parts = summary(out)
    assert parts["baseline"]["params"] == parts["dense"]["params"] > parts["slim"]["params"]
    assert set(parts["baseline"]["metrics"]) == {"top1"} and "baseline" not in summary(plain)
    lines = dict(list(load_run(out).metrics.groupby("stage")))
    assert list(lines["baseline"]["lr"]) == list(lines["train"]["lr"]) and (lines["baseline"]["penalty"] == 0).all()
    assert lines["baseline"]["alive"].iloc[-1] > lines["train"]["alive"].iloc[-1]
    assert set(json.loads((out / "curves.json").read_text())) == {"baseline", "dense", "slim", "finetuned"}


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_stage_with_ema_ends_with_averaged_weights(run_it, plain, tmp_path, stage):
    out = run_it(tmp_path / "run", f"{stage}.ema=0.9")
    name = {"train": "dense", "finetune": "finetuned"}[stage]
    assert weights(out, name) != weights(plain, name)
    held, _ = RunDir.open(out).load_checkpoint(stage)
    # The raw weights equal those of a training without EMA.
    model = load_model(RunDir.open(plain), name).state_dict()
    if stage == "train":
        assert all((held[f"model/{key}"] == value.numpy()).all() for key, value in model.items())
    mean = load_model(RunDir.open(out), name).state_dict()
    assert all(abs(held[f"average/{key}"] - value.numpy()).max() < 1e-29 for key, value in mean.items())


def test_teacher_changes_finetuned_weights(run_it, plain, tmp_path):
    found = {}
    for teacher in ("dense", "baseline"):
        distill = f"finetune.distill={{weight: 0.5, teacher: {teacher}}}"
        found[teacher] = weights(run_it(tmp_path / teacher, "baseline=true", distill), "finetuned")
        assert weights(tmp_path / teacher, "slim") == weights(plain, "slim")
    assert len({*found.values(), weights(plain, "finetuned")}) == 3


def broken_off(run_it, out, stage, step, *overrides):
    """Interrupt a run after the checkpoint of this step."""
    with interrupted_after_checkpoint(stage, global_step=step):
        run_it(out, *overrides)


@pytest.mark.parametrize(
    ("stage", "step"), [("train", 3), ("baseline", 1), slow("baseline", 2), slow("baseline", 4), ("finetune", 1)]
)
def test_resumed_run_equals_uninterrupted_run(run_it, whole, tmp_path, stage, step):
    out = tmp_path / "run"
    overrides = [*ALL, "train.checkpoint.steps=1", "finetune.checkpoint.steps=1"]
    broken_off(run_it, out, stage, step, *overrides)
    assert RunDir.open(out).stage == ("finetune" if stage == "finetune" else "train")
    run_it(out, *overrides, resume=True)
    found, wanted = outcome(out), outcome(whole)
    for one in (found, wanted):
        for name in ("recipe.yaml", "extract/plan.json", "slim/plan.json", "finetuned/plan.json"):
            del one[name]  # plans hold the recipe's hash
    assert found == wanted


def test_damaged_train_checkpoint_repeats_baseline_too(run_it, whole, tmp_path):
    """Its newest checkpoint is damaged, so an epoch and everything after it are repeated."""
    out = tmp_path / "run"
    broken_off(run_it, out, "baseline", 4, *ALL)
    newest = max((out / "checkpoints").glob("train-*.json"))
    newest.write_bytes(b"{}")
    run_it(out, *ALL, resume=True)
    assert outcome(out) == outcome(whole)


def test_finetune_without_teacher_model_is_refused(plain, photos, tmp_path):
    wanted = toy_recipe(photos, *CUTTING, *ALL)
    with pytest.raises(RecipeError, match=r"finetune.distill.teacher: .* has no baseline model; set finetune.distill"):
        finetune_run(plain, wanted, tmp_path / "tuned", quiet())
    assert not (tmp_path / "tuned").exists()


def test_restart_from_train_repeats_everything(run_it, whole, tmp_path):
    out = run_it(tmp_path / "run", *ALL)
    run_it(out, *ALL, resume=True, start_from="train")
    assert outcome(out) == outcome(whole)


def test_derived_runs_copy_the_baseline(whole, photos, tmp_path):
    slimmed = slim_run(whole, toy_recipe(photos, *CUTTING, *ALL, "slim.threshold=0.45"), tmp_path / "slim", quiet())
    tuned = finetune_run(slimmed, toy_recipe(photos, *CUTTING, *ALL, "finetune.epochs=2"), tmp_path / "tuned", quiet())
    for out in (slimmed, tuned):
        assert weights(out, "baseline") == weights(whole, "baseline")
        assert summary(out)["baseline"] == summary(whole)["baseline"]
        assert load_run(out).problems == [], "what a derived run has no part in is not missing there"
    (slimmed / "layers.json").unlink()
    assert load_run(slimmed).problems == ["layers.json: missing"]


def test_init_with_fresh_weights(run_it, plain, tmp_path):
    fresh = (f"init={plain}", "init_weights=fresh", "decay.name=none")
    out = run_it(tmp_path / "run", *fresh)
    run, source = RunDir.open(out), RunDir.open(plain)
    assert summary(out)["dense"]["params"] == summary(plain)["slim"]["params"]
    plan = read_plan(source, "slim")
    drawn = build_with_plan(read_recipe(run), plan).state_dict()
    begun = run.read_tensors("init/model.safetensors")
    assert all((begun[name] == value.numpy()).all() for name, value in drawn.items())
    own = load_model(source, "finetuned").state_dict()
    assert any((begun[name] != value.numpy()).any() for name, value in own.items())
    # Layers that kept all channels have the builder's initial weights.
    dense = build_dense(read_recipe(run)).state_dict()
    assert any(value.shape == dense[name].shape and (value == dense[name]).all() for name, value in drawn.items())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["init_weights=fresh"], r"init_weights: 'fresh' takes the channel counts of a run; name one with init=RUN"),
        (
            ["finetune.distill={weight: 0.5, teacher: baseline}"],
            r"finetune.distill.teacher: there is no baseline; set baseline=true",
        ),
        (["train.loss=structure"], r"the loss structure compares maps with masks, .* class labels"),
        (["finetune.loss={name: bce_iou, options: {iou: -1.0}}"], r"the loss bce_iou compares maps"),
        (["train.ema=1"], r"train.ema: 1 must be less than 1"),
        (["train.distill.weight=0.5"], r"train.distill: unknown key here; use finetune.distill"),
    ],
)
def test_invalid_combinations_are_refused_before_writing(run_it, tmp_path, overrides, said):
    with pytest.raises(RecipeError, match=said) as caught:
        run_it(tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
