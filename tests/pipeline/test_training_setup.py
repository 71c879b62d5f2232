"""A model with side outputs goes through a whole run; gates that cannot fall to the threshold."""

import json

import onnxruntime
import pytest
import torch
from helpers.toy_run import killed_in, outcome, quiet, shorten, toy_recipe, write_photos
from rich.console import Console

from prunekit.config.recipe import load
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import build_dense
from prunekit.pipeline.runner import run_recipe
from prunekit.pipeline.training_setup import gates_out_of_reach
from prunekit.utils.progress import Reporter

SIDES = """
import torch
from torch import nn

def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

class Sides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.main, self.side = block(3, 6), block(6, 6), nn.Conv2d(6, 1, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        a = self.a(x)
        return self.main(self.b(a)), self.side(nn.functional.max_pool2d(a, 2))

def sides():
    return Sides()
"""


@pytest.mark.slow
def test_a_model_with_side_outputs(tmp_path):
    (tmp_path / "sides.py").write_text(SIDES)
    overrides = [
        f"backbone={{name: sides, file: {tmp_path / 'sides.py'}}}",
        "data={name: salient_shapes, size: 16, options: {train: 6, val: 3}}",
        "train={epochs: 1, batch_size: 3, output_weights: [1, 0.5]}",
        "finetune={epochs: 1, batch_size: 3, distill: {weight: 0.5}}",
        "slim.importance=taylor",
        "train.gradual_pruning.start=null",
        "target.params_ratio=0.7",
        "export={onnx: true, preprocess: true}",
    ]
    run_recipe(load("csnet", overrides), tmp_path / "run", quiet())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "complete" and summary["equivalence"]["passed"]
    assert summary["slim"]["params"] < summary["dense"]["params"]
    outputs = onnxruntime.InferenceSession(tmp_path / "run/model.onnx").get_outputs()
    assert len(outputs) == 2
    session = onnxruntime.InferenceSession(tmp_path / "run/exports/finetuned-image.onnx")
    (maps,) = session.run(None, {"image": torch.zeros(1, 20, 24, 3, dtype=torch.uint8).numpy()})
    assert maps.shape == (1, 20, 24)


PROGRESSIVE = [
    "train.progressive={sizes: [6, 8], recalibrate: 2}",
    "train.epochs=4",
    "baseline=true",
    "slim.importance=random",
]
PROGRESSIVE += ["target.params_ratio=0.9", "finetune.progressive={sizes: [4, 8], recalibrate: 2}", "finetune.epochs=2"]


def test_progressive_run_and_its_resumption(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    recipe = toy_recipe(write_photos(tmp_path / "photos"), *PROGRESSIVE)
    run_recipe(recipe, tmp_path / "whole", Console(width=300))
    out = capsys.readouterr().out.splitlines()
    assert "train: images of 8×8 in batches of 6 from epoch 3 on" in out
    said = [line for line in out if "norms recalibrated on 2 batches" in line]
    assert [line.partition(":")[0] for line in said] == ["train", "baseline", "finetune"]
    whole = outcome(tmp_path / "whole")
    sizes = [(row["stage"], row["size"]) for row in whole["metrics"]]
    expected = {"train": (6, 6, 8, 8), "baseline": (6, 6, 8, 8), "finetune": (4, 8)}
    assert sizes == [(stage, size) for stage, each in expected.items() for size in each]
    with killed_in(3):
        run_recipe(recipe, tmp_path / "broken", quiet())
    run_recipe(recipe, tmp_path / "broken", quiet(), resume=True)
    assert outcome(tmp_path / "broken") == whole


def test_norms_are_not_recalibrated_for_one_size(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    overrides = ["train.progressive={sizes: [8], recalibrate: 2}", "finetune.progressive.sizes=[6, 8]"]
    recipe = toy_recipe(write_photos(tmp_path / "photos"), *overrides, "finetune.epochs=2")
    run_recipe(recipe, tmp_path / "run", Console(width=300))
    assert "recalibrated" not in capsys.readouterr().out


REACH = ["slim.threshold=0.5", "train.gate_lr=0.04"]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 4),  # 12 images for training, in batches of 6, two epochs
        (["train.epochs=3"], 6),
        (["train.accumulate=2"], 2),
        (["train.epochs=7"], None),
        (["train.epochs=0"], None),
        (["train.gate_lr=0.2"], None),
        (["train.optimizer={name: sgd}"], None),
        (["target.params_ratio=0.5"], None),
        (["train.epochs=8", "train.gradual_pruning={start: 0.5, end: 0.75}"], 8),
    ],
)
def test_threshold_that_no_gate_can_reach(tmp_path, overrides, steps):
    recipe = toy_recipe(write_photos(tmp_path / "photos"), *REACH, "train.schedule=constant", *overrides)
    context, model = RunContext(recipe, Reporter(quiet())), build_dense(recipe)
    found = gates_out_of_reach(context, model, context.dense_groups(model))
    assert (found is None) == (steps is None)
    if steps is not None:
        assert found.startswith(f"with adam, a gate falls by about {0.04 * steps:.2g} at most in {steps} steps")
        assert found.endswith("none reaches slim.threshold=0.5; raise train.gate_lr or train.epochs")


def test_training_too_short_for_the_threshold_is_reported_before_and_after(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    recipe = toy_recipe(write_photos(tmp_path / "photos"), *REACH, "export.onnx=false", "train.schedule=constant")
    run_recipe(recipe, tmp_path / "run", Console(width=300))
    out = capsys.readouterr().out
    for stage in ("train", "extract"):
        assert f"{stage}: with adam, a gate falls by about 0.16 at most in 4 steps at train.gate_lr=0.04" in out
