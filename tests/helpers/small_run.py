"""A run folder of a tiny untrained classifier, dense and slim; and a way to skip the export."""

import torch

from helpers.networks import init_norms, zero_gates
from prunekit.backbones import build
from prunekit.config.schema import Recipe
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import save_model
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.slim import slim
from prunekit.reporting import report
from prunekit.runs.run_dir import RunDir
from prunekit.utils.environment import environment

# Shipped recipes prune gradually, to a target, and need no fine-tuning.
BY_THRESHOLD = ["train.gradual_pruning.start=null", "target.params_ratio=null", "finetune.epochs=1"]

OPTIONS = {"depth": 8, "width": 4, "classes": 10}


def skip_export(monkeypatch):
    """Replace the export by something quick, and skip the rehearsal and the figures."""
    skip_rehearsal(monkeypatch)
    skip_figures(monkeypatch)
    monkeypatch.setattr("prunekit.pipeline.export.deploy", lambda model, *_, **__: (model, NoRecord))
    monkeypatch.setattr("prunekit.pipeline.export.export_onnx", lambda *_: b"a file")
    monkeypatch.setattr("prunekit.pipeline.export.check_onnx", lambda *_: 0.0)


def skip_rehearsal(monkeypatch):
    for module in ("preflight", "runner"):
        monkeypatch.setattr(f"prunekit.pipeline.{module}.rehearse", lambda *_, **__: None)


def skip_figures(monkeypatch):
    """Reports without figures and with an empty page."""
    monkeypatch.setitem(report.__globals__, "report_figures", lambda *_: iter(()))
    monkeypatch.setitem(report.__globals__, "render_page", lambda *_: "")


class NoRecord:
    """Stands in for the record of a deployed form."""

    @staticmethod
    def to_json():
        return {}


def small_run(path):
    recipe = Recipe.model_validate(
        {
            "name": path.name,
            "backbone": {"name": "resnet", "options": OPTIONS},
            "task": "classification",
            "data": {"name": "digits", "size": 16},
            "train": {"epochs": 0},
            "finetune": {"epochs": 0},
        }
    )
    torch.manual_seed(0)
    dense = build("resnet", OPTIONS)
    example = init_norms(dense, 0, 16)
    groups = find_groups(dense, example)
    zero_gates(dense, groups, 0.5)
    with torch.no_grad():
        # Subnormal weights, as sparse training leaves them.
        dense.conv.weight.view(-1)[:7] = 1e-40
    small, equivalence = slim(dense, extract(dense, groups), example, groups=groups)
    with RunDir.start(path, recipe.dump(), environment(0)) as run:
        for name, model, plan in (("dense", dense, None), ("slim", small, equivalence.plan)):
            save_model(run, name, model, plan)
            run.update_summary(name, total(count_modules(model, (3, 16, 16))[0]))
        run.write_json("classes.json", [str(digit) for digit in range(10)])
        for stage in ("train", "extract", "slim"):
            run.end(stage)
        run.finish()
    return path
