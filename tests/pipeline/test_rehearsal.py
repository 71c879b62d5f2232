"""What would fail after training is named before it, and nothing is written."""

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.small_run import skip_figures
from helpers.toy_run import quiet
from torch import nn

from prunekit.config.recipe import load
from prunekit.deployment.export import onnx
from prunekit.errors import ExportError, PlanError, RecipeError
from prunekit.pipeline import export, rehearsal
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import build_dense
from prunekit.pipeline.rehearsal import rehearse
from prunekit.pipeline.runner import run_recipe
from prunekit.tasks.classification import Classification
from prunekit.utils.progress import Reporter

QUICK = ["backbone.options.width=4", "train.epochs=1", "finetune.epochs=0", "data.size=16"]
PLAIN = [*QUICK, "export.onnx=false"]


class Refused(nn.Module):
    """Fails for less than eight channels."""

    def forward(self, x):
        if x.shape[1] != 8:
            raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")
        return x


def context_of(*overrides):
    return RunContext(load("digits_resnet", [*QUICK, *overrides]), Reporter(quiet()))


def network(middle=None):
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [middle or nn.Identity(), nn.Conv2d(8, 7, 3), nn.BatchNorm2d(7), nn.ReLU()]
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 10))


def test_rehearsal_leaves_model_and_random_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = context_of("export.preprocess=true")
    model = build_dense(context.recipe)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    rehearse(context, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole", [False, True])
def test_group_that_cannot_be_cut_is_named(monkeypatch, whole):
    context, model = context_of("export.onnx=false"), network()
    slim = rehearsal.slim

    def failing(model, plan, *args, **kwargs):
        cut = [name for name, kept in plan.groups.items() if 0 not in kept]
        if ("3" in {name.partition(".")[0] for name in cut} and not whole) or len(cut) > 2:
            raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")
        return slim(model, plan, *args, **kwargs)

    monkeypatch.setattr(rehearsal, "slim", failing)
    with pytest.raises(RecipeError) as error:
        rehearse(context, model)
    names = "0, 3 and 7" if whole else "3"
    keep = "[0, 3, 7]" if whole else "[3]"
    assert f"one channel of {names} fails (RuntimeError: mat1 and mat2)" in str(error.value)
    assert f"slim.ignored_layers={keep}" in str(error.value) and "\n" not in str(error.value)


def test_ignored_layers_are_not_rehearsed():
    context = context_of("export.onnx=false", "slim.ignored_layers=['3']")
    rehearse(context, network(Refused()))


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (RuntimeError("mat1 and mat2\nshapes"), "onnx"),
        (ExportError("no such operator"), "preprocess"),
        *[slow(KeyError("_5"), "onnx"), slow(KeyError("_5"), "preprocess")],
        *[slow(RuntimeError("mat1 and mat2"), "preprocess"), slow(ExportError("no such operator"), "onnx")],
    ],
)
def test_export_that_fails_is_named_before_the_run(tmp_path, monkeypatch, error, key):
    def failing(file, model, inputs, path):
        if ("image" in path) == (key == "preprocess"):
            raise error
        return 0.0

    monkeypatch.setattr(export, "check_onnx", failing)
    with pytest.raises(RecipeError, match=rf"^export\.{key} fails \(.*\); set export\.{key}=false") as refused:
        run_recipe(load("digits_resnet", [*QUICK, "export.preprocess=true"]), tmp_path / "run", quiet())
    assert str(refused.value).count("\n") == 0 and not (tmp_path / "run").exists()


def test_int8_export_that_fails_is_named_before_the_run(tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("no such type")

    monkeypatch.setattr(export, "quantize_onnx", failing)
    with pytest.raises(RecipeError, match=r"^export\.int8 fails \(.*no such type\); set export\.int8=false"):
        run_recipe(load("digits_resnet", [*PLAIN, "export.int8=true"]), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_evaluation_that_fails_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "postprocess", lambda self, scores, size: scores.numpy().reshape(3, 3))
    with pytest.raises(RecipeError, match=r"^evaluating one image with task classification fails"):
        run_recipe(load("digits_resnet", PLAIN), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_resumed_run_is_not_rehearsed(tmp_path, monkeypatch):
    called = []
    skip_figures(monkeypatch)
    monkeypatch.setattr("prunekit.pipeline.preflight.rehearse", lambda *_: called.append(1))
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        run_recipe(load("digits_resnet", PLAIN), tmp_path / "run", quiet(), **flags)
    assert len(called) == 2


def test_importance_that_fails_is_named(monkeypatch):
    def failing(*_):
        raise RuntimeError("element 0 of tensors does not require grad")

    context = context_of("slim.importance=taylor", "target.params_ratio=0.5", "export.onnx=false")
    monkeypatch.setattr("prunekit.pipeline.prune_stages.bind_options", lambda *_: failing)
    with pytest.raises(RecipeError, match=r"^slim\.importance=taylor fails \(RuntimeError: element 0"):
        rehearse(context, network())


def test_target_that_cannot_be_met_leaves_no_folder(tmp_path):
    with pytest.raises(PlanError, match="budget of 50 params cannot be met"):
        run_recipe(load("digits_resnet", [*PLAIN, "target.params=50"]), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_network_without_prunable_groups_passes():
    context = context_of("export.onnx=false", "target.params_ratio=null")
    rehearse(context, nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def test_no_group_is_blamed_where_the_whole_network_fails():
    class Single(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float32, "needs float32"
            return x

    with pytest.raises(RecipeError, match=r"^backbone resnet: the equivalence check fails .*float64") as error:
        rehearse(context_of("export.onnx=false"), network(Single()))
    assert "one channel" not in str(error.value)


@pytest.mark.parametrize("error, passes", [(1e-3, True), (0.1, False)])
def test_rounding_errors_of_an_untrained_network_are_no_failure(monkeypatch, error, passes):
    compile_file = onnx.onnx_function

    def rough(file):
        function = compile_file(file)
        return lambda *inputs: function(*inputs) + np.float32(error)

    monkeypatch.setattr(onnx, "onnx_function", rough)
    context, model = context_of(), network()
    if passes:
        rehearse(context, model)
    else:
        with pytest.raises(RecipeError, match=r"^export\.onnx fails"):
            rehearse(context, model)
