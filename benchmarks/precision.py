"""What lower precision costs: one model in float32, bf16 and int8, its metrics on the same images.

    python benchmarks/precision.py runs/l-x2 data.root=PHOTOS data.val_root=PHOTOS-FOR-FINAL-FIGURES
    python benchmarks/precision.py runs/csnet --forms ort,ort_int8

int8 is calibrated on training images, as `prunekit export --int8` does it. The times of these forms are told by
latency.py; where a processor has no arithmetic of a precision, it is computed in another and costs time, not accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from prunekit.data.datasets import normalize
from prunekit.deployment.deploy import deploy
from prunekit.deployment.export.onnx import export_onnx, onnx_function
from prunekit.deployment.export.openvino import openvino_function
from prunekit.deployment.export.quantize import quantize_onnx
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.export import CALIBRATION, Computed, with_data
from prunekit.pipeline.models import load_model, newest_model
from prunekit.runs.run_dir import RunDir
from prunekit.utils.progress import Reporter

FORMS = ("eager", "deployed", "deployed_bf16", "ort", "openvino", "openvino_bf16", "ort_int8", "openvino_int8")


class Cast(nn.Module):
    """A model in bf16 between float32 tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.to(torch.bfloat16)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.bfloat16()).float()


class Forms:
    """One model, made ready in each form."""

    def __init__(self, work: RunContext, model: nn.Module):
        self.work, self.model = work, model
        self.example = work.example()
        self.files: dict[str, bytes] = {}

    def make(self, form: str) -> nn.Module:
        runtime, _, precision = form.partition("_")
        if runtime == "eager":
            return self.model
        if runtime == "deployed":
            # Kernels of our own compute in float32 alone.
            model = deploy(self.model, self.example, runtime="pt2" if precision else "torch")[0]
            return Cast(model) if precision else model
        file = self._file(runtime, precision == "int8")
        if runtime == "ort":
            return Computed(onnx_function(file))
        return Computed(openvino_function(file, precision="bf16" if precision == "bf16" else "f32"))

    def _file(self, runtime: str, int8: bool) -> bytes:
        key = "int8" if int8 else runtime
        if key not in self.files:
            source = {"ort": "onnxruntime"}.get(key, key)
            file = export_onnx(deploy(self.model, self.example, runtime=source)[0], self.example)
            if int8:
                train = self.work.tensors("train")
                places = np.unique(np.linspace(0, len(train) - 1, min(CALIBRATION, len(train))).astype(int))
                batches = [normalize(train.images[int(i)][None]).numpy() for i in places]
                file = quantize_onnx(file, batches)
            self.files[key] = file
        return self.files[key]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*", help="data.KEY=VALUE")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    run = RunDir.open(args.run)
    recipe = with_data(run, args.overrides)
    work = RunContext(recipe, Reporter(Console(stderr=True)))
    forms = Forms(work, without_subnormals(load_model(run, newest_model(run), recipe)).eval())
    pairs = work.dataset("val")
    found = {}
    for form in args.forms.split(","):
        found[form] = work.task.evaluate(forms.make(form), pairs, recipe.data.size, 16).metrics
    if args.json:
        print(json.dumps(found))
    else:
        names = list(next(iter(found.values())))
        print(f"{len(pairs)} images\n\n| form | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
        for form, metrics in found.items():
            print(f"| {form} | " + " | ".join(f"{metrics[name]:.4f}" for name in names) + " |")
    return found


if __name__ == "__main__":
    main()
