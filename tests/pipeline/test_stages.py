"""Advice for models that are no better than trivial predictors, and for dead networks; repeated training."""

import logging

import pytest
from helpers.toy_run import outcome, quiet, shorten, toy_recipe, write_photos

from prunekit.config.schema import Recipe
from prunekit.errors import PlanError
from prunekit.pipeline import prune_stages
from prunekit.pipeline.models import load_model, read_plan, save_model
from prunekit.pipeline.runner import run_recipe, slim_run
from prunekit.pipeline.stages import trivial_warning
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.classification import Classification
from prunekit.tasks.saliency import Saliency

GOOD, EQUAL, BAD = {"top1": 0.9}, {"top1": 0.5}, {"top1": 0.25}
TRIVIAL = {"majority": {"top1": 0.5}, "other": {"top1": 0.4}}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    shorten(monkeypatch)
    return write_photos(tmp_path / "photos")


def recipe_with(**sections):
    base = {"name": "a", "backbone": {"name": "resnet"}, "data": {"name": "digits"}}
    return Recipe.model_validate({**base, "train": {"epochs": 2}, "finetune": {"epochs": 1}, **sections})


@pytest.mark.parametrize(
    "metrics, sections, advice",
    [
        ({"dense": GOOD, "slim": GOOD, "finetuned": GOOD}, {}, None),
        ({"dense": GOOD, "slim": BAD, "finetuned": GOOD}, {}, None),
        ({"dense": GOOD, "slim": BAD}, {}, "slim 0.2500; fine-tune longer (finetune.epochs), or lower slim.threshold"),
        ({"dense": GOOD, "slim": BAD, "finetuned": EQUAL}, {}, "slim 0.2500, finetuned 0.5000; fine-tune longer"),
        (
            {"dense": GOOD, "finetuned": BAD},
            {"target": {"params": 9}},
            "fine-tune longer (finetune.epochs), or raise target.params",
        ),
        ({"dense": EQUAL, "slim": BAD}, {}, "0.2500; train longer (train.epochs), or lower decay.weight"),
        ({"dense": BAD}, {"target": {"macs_ratio": 0.5}}, "train longer (train.epochs), or raise target.macs_ratio"),
        ({"dense": BAD}, {"decay": {"weight": 0.0}}, "train longer (train.epochs), or with another train.lr"),
        ({"baseline": BAD, "dense": BAD}, {}, "train longer (train.epochs), or with another train.lr"),
    ],
)
def test_warning_where_a_model_is_no_better_than_a_trivial_predictor(metrics, sections, advice):
    warning = trivial_warning(Classification(), recipe_with(**sections), metrics, TRIVIAL)
    assert (warning is None) == (advice is None)
    if advice:
        assert warning.startswith("no better than the trivial predictor majority (top1 0.5000): ") and advice in warning


@pytest.mark.parametrize("score, warned", [(0.1, False), (0.3, True), (0.4, True)])
def test_metrics_of_which_lower_is_better(monkeypatch, score, warned):
    monkeypatch.setattr(Saliency, "metric_names", ("mae", "max_f"))
    warning = trivial_warning(Saliency(), recipe_with(), {"dense": {"mae": score}}, {"colour": {"mae": 0.3}})
    assert (warning is not None) == warned


@pytest.mark.parametrize("top1, warned", [(1.0, True), (-1.0, False)])
def test_run_warns(tmp_path, photos, caplog, monkeypatch, top1, warned):
    monkeypatch.setattr(Classification, "trivial_scores", lambda *_: {"majority": {"top1": top1}})
    with caplog.at_level(logging.WARNING):
        run_recipe(toy_recipe(photos), tmp_path / "run", quiet())
    assert any("no better than the trivial predictor majority" in text for text in caplog.messages) == warned
    assert ("warning: evaluate: no better than" in (tmp_path / "run/run.log").read_text()) == warned


@pytest.mark.parametrize(
    "override, dead, advice",
    [
        ("slim.threshold=0.5", False, r"again, without training it: prunekit slim \S+/run slim\.threshold=LOWER"),
        ("target.params_ratio=0.5", False, r"prunekit slim \S+/run target\.params_ratio=LARGER"),
        ("slim.threshold=0.5", True, r"already as trained; lower decay\.weight, or .* start again with --overwrite"),
        ("target.params=900", True, r"already as trained; target\.params is too small for this training: raise it"),
    ],
)
def test_advice_for_a_dead_network(tmp_path, photos, monkeypatch, override, dead, advice):
    def slim(*_):
        raise PlanError(f"not equivalent: {prune_stages.DEAD}; lower slim.threshold")

    def load(run, name, recipe):
        model = load_model(run, name, recipe)
        if dead:
            list(model.parameters())[-2].data.zero_()
        return model

    monkeypatch.setattr(prune_stages, "_slim_in_rounds", slim)
    monkeypatch.setattr(prune_stages, "load_model", load)
    with pytest.raises(PlanError, match=advice) as error:
        run_recipe(toy_recipe(photos, override), tmp_path / "run", quiet())
    assert "--resume would end here again" in str(error.value) and "\n" not in str(error.value)
    assert ("slim.threshold" in str(error.value)) == (override.startswith("slim") and not dead)


def test_training_a_derived_run_again_ignores_the_other_model(tmp_path, photos):
    recipe, whole = toy_recipe(photos, "train.epochs=1"), tmp_path / "whole"
    run_recipe(recipe, whole, quiet())
    trained = RunDir.open(whole)
    plan = read_plan(trained, "slim")
    plan.dense_hash = None
    with RunDir.start(tmp_path / "imported", recipe.dump(), {}) as imported:
        save_model(imported, "slim", load_model(trained, "slim"), plan)
        imported.write_json("classes.json", trained.read_json("classes.json"))
        imported.update_summary("slim", {})
        for stage in ("train", "extract", "slim"):
            imported.end(stage)
        imported.finish()
    derived = tmp_path / "derived"
    slim_run(tmp_path / "imported", recipe, derived, quiet())
    run_recipe(recipe, derived, quiet(), resume=True, start_from="train")
    found, expected = outcome(derived), outcome(whole)
    del found["data.json"], expected["data.json"]
    assert found == expected
