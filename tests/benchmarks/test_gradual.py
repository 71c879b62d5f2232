import json

import gradual
import pytest


@pytest.mark.parametrize("way", gradual.TORCH_PRUNING)
def test_torch_pruning_reaches_the_size(tmp_path, way):
    tiny = ["backbone.options={depth: 8, width: 8}", "train.epochs=4", "train.batch_size=64"]
    keys = gradual.overrides_of(way, "digits_resnet", 0.5, 0, tiny)
    gradual.run_torch_pruning(way, "digits_resnet", keys, tmp_path / f"digits_resnet-{way}-0.5-0")
    ((*_, params, macs, trained, slim, finetuned, drift, seeds),) = gradual.rows(
        tmp_path, [("digits_resnet", way, 0.5)], [0, 1]
    )
    assert 0.4 <= float(params) <= 0.5 and 0 < float(macs) < 1 and seeds == "1" and not drift
    assert 0 <= float(slim) <= 1 and min(float(trained), float(finetuned)) > 0.5


def test_epochs_are_equal():
    ratios = {"dense": None}
    keys = [gradual.overrides_of(way, "digits_resnet", ratios.get(way, 0.5), 3, []) for way in gradual.WAYS]
    both = [gradual.load("digits_resnet", own) for own in keys]
    assert {recipe.train.epochs + recipe.finetune.epochs for recipe in both} == {38}
    assert {recipe.seed for recipe in both} == {3}
    dense, way, *_ = both
    assert dense.target.params_ratio is None and way.target.params_ratio == 0.5
    assert dense.train.gradual_pruning.start is None and way.train.gradual_pruning.start is not None


def test_only_complete_runs_are_rows(tmp_path):
    run = tmp_path / "a-dense-None-0"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"status": "failed"}))
    assert gradual.rows(tmp_path, [("a", "dense", None)], [0]) == []
