"""A model with side outputs goes through a whole run."""

import json

import onnxruntime
import pytest
import torch
from helpers.toy_run import quiet

from prunekit.config.recipe import load
from prunekit.pipeline.runner import run_recipe

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
