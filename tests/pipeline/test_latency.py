"""Runs with a budget of time, on a machine whose latencies are a formula."""

import json

import pytest
import torch
from helpers.latencies import cut, synthetic_ms, synthetic_table
from helpers.toy_run import quiet, shorten, toy_recipe, write_photos
from safetensors.torch import load_file
from torch import nn

import prunekit.pipeline.latency
from prunekit.errors import PlanError, RecipeError
from prunekit.pipeline.latency import RunLatencies
from prunekit.pipeline.runner import run_recipe
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.latency_model import LatencyTable
from prunekit.utils.progress import Reporter


class FormulaTimer:
    """As ``VariantTimer``, without a machine."""

    measured = 0
    slower = 1.0  # than the table says, of a model that is timed alone

    def __init__(self, model, groups, example, runtime, threads):
        self.model, self.groups, self.shape = model, groups, tuple(example.shape[1:])
        self.runtime, self.dense_ms = runtime, synthetic_ms(model, self.shape, vector=1)

    def new_table(self):
        return LatencyTable(runtime=self.runtime, size=list(self.shape))

    def time(self, kept, progress=lambda share: None):
        type(self).measured += len(kept)
        factor = self.slower if len(kept) == 1 else 1.0
        return [factor * synthetic_ms(cut(self.model, self.groups, one), self.shape, vector=1) for one in kept]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prunekit.pipeline.latency, "VariantTimer", FormulaTimer)
    photos = write_photos(tmp_path / "photos")

    def start(name, *overrides):
        with monkeypatch.context() as patch:
            shorten(patch)
            options = ("backbone.options={depth: 14, width: 8, classes: 2}", "finetune.epochs=0", "latency.size=32")
            recipe = toy_recipe(photos, *options, "latency.variants=40", "decay.weight=0.1", *overrides)
            run_recipe(recipe, tmp_path / name, quiet())
        return json.loads((tmp_path / name / "summary.json").read_text())

    return start


def test_slim_model_has_the_latency_that_was_asked_for(run):
    for number, gradual in enumerate(("{start: 0.25, end: 0.75}", "{start: null}")):
        FormulaTimer.measured = 0
        summary = run(f"{number}", "target.latency_ratio=0.6", f"train.gradual_pruning={gradual}")
        assert summary["latency"]["ratio"] == pytest.approx(0.6, rel=0.05)
        assert summary["latency"]["dense_ms"] > summary["latency"]["slim_ms"]
        # The second run finds the table in the user's cache.
        assert (FormulaTimer.measured > 40) == (number == 0)
        if number == 0:
            assert summary["drift"]["max_abs_diff"] < 1e-4 and summary["equivalence"]["given_back"] == 0


def test_networks_with_the_same_groups_have_their_own_tables(run, tmp_path):
    def measured(pool):
        FormulaTimer.measured = 0
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), pool, nn.Conv2d(8, 2, 1)).eval()
        groups = find_groups(model, torch.zeros(1, 3, 8, 8))
        RunLatencies(toy_recipe(tmp_path / "photos", "latency.variants=12"), model, groups, Reporter(quiet()))
        return FormulaTimer.measured

    assert [measured(one) for one in (nn.AvgPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(2))] == [12, 0, 12]


def is_gate(name, value):
    return name.endswith("weight") and value.dim() == 1


def test_choice_is_corrected_where_predictions_are_wrong(run, monkeypatch, tmp_path):
    monkeypatch.setattr(FormulaTimer, "slower", 1.3)
    summary = run("wrong", "target.latency_ratio=0.6", "train.gradual_pruning={start: 0.25, end: 0.75}")
    assert summary["latency"]["ratio"] == pytest.approx(0.6, rel=0.05)
    # All that have shrunk to zero are removed, although fewer would do by the prediction.
    assert summary["drift"]["max_abs_diff"] < 1e-4
    gates = load_file(tmp_path / "wrong" / "dense" / "model.safetensors")
    slim = load_file(tmp_path / "wrong" / "slim" / "model.safetensors")
    zeros = sum(int((value == 0).sum()) for name, value in gates.items() if is_gate(name, value))
    left = sum(int((value == 0).sum()) for name, value in slim.items() if is_gate(name, value))
    assert zeros > left == 0


def test_table_of_another_machine_is_read(run, tmp_path):
    import torch

    from prunekit.backbones.resnet import resnet
    from prunekit.pruning.graph.groups import find_groups

    model = resnet(depth=14, width=8, classes=2)
    groups = find_groups(model, torch.zeros(2, 3, 32, 32))
    table = synthetic_table(model, groups, (3, 32, 32))
    file = tmp_path / "phone.json"
    file.write_text(json.dumps(table.to_json()))
    FormulaTimer.measured = 0
    summary = run("phone", "target.latency_ratio=0.6", f"latency.table={file}")
    assert FormulaTimer.measured == 0 and "latency" not in summary
    file.write_text(json.dumps({**table.to_json(), "variants": []}))
    with pytest.raises(PlanError, match="0 measured variants; measure at least 10"):
        run("empty", "target.latency_ratio=0.6", f"latency.table={file}")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["target.latency_ms=1", "target.latency_ratio=0.5"], "latency_ms and latency_ratio; keep one"),
        (["target.latency_ratio=0.5", "slim.scope=layer"], "slim.scope: target.latency_ratio ranks channels by what"),
        (["target.latency_ratio=0.5", "slim.cost_power=1"], "slim.cost_power: target.latency_ratio ranks"),
        (["target.latency_ratio=2"], "target.latency_ratio: "),
        (["latency.runtime=tflite"], "latency.runtime: "),
    ],
)
def test_wrong_keys_are_reported(tmp_path, keys, words):
    with pytest.raises(RecipeError, match=words):
        toy_recipe(tmp_path, *keys)
