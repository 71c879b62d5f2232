"""Export of a run's model."""

import io
import json
import shutil

import numpy as np
import onnx
import openvino
import pytest
import torch
from helpers.small_run import NoRecord, small_run
from rich.console import Console
from torch import nn

from prunekit.cli import main
from prunekit.deployment.export.onnx import onnx_function, tensors
from prunekit.deployment.export.subnormals import subnormal_count
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.export import Exporter, Variant, without_paths
from prunekit.pipeline.models import load_model, read_recipe
from prunekit.reporting import load_run
from prunekit.runs.run_dir import RunDir
from prunekit.tasks.classification import Classification
from prunekit.utils.progress import Reporter


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "tiny")


def test_onnx_metadata(folder):
    assert command("export", folder, "--format", "onnx") == 0
    file = (folder / "model.onnx").read_bytes()
    said = {p.key: p.value for p in onnx.load_from_string(file).metadata_props}
    summary = json.loads((folder / "summary.json").read_text())
    assert int(said["params"]) == summary["slim"]["params"] and int(said["macs"]) == summary["slim"]["macs"]
    assert json.loads(said["recipe"])["name"] == "tiny" and json.loads(said["plan"])["groups"]
    assert json.loads(said["preprocessing"])["size"] == [16, 16] and len(json.loads(said["classes"])) == 10
    assert str(folder).encode() not in file
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in tensors(onnx.load_from_string(file))]
    assert weights and not sum(map(subnormal_count, weights))
    assert summary["export"]["path"] == "model.onnx" and summary["export"]["max_abs_diff"] < 1e-4
    assert not [line for line in load_run(folder).problems if "summary" in line]


def test_openvino_files_load_without_prunekit(folder):
    assert command("export", folder, "--format", "openvino", "--model", "dense", "--plain") == 0
    model = openvino.Core().read_model(folder / "exports/dense-plain.xml")
    assert model.get_rt_info(["prunekit", "model"]).astype(str) == "dense"
    constants = [op.data for op in model.get_ops() if op.get_type_name() == "Constant"]
    assert constants and not sum(subnormal_count(np.asarray(values)) for values in constants)
    image = torch.randn(2, 3, 19, 24)
    network = load_model(RunDir.open(folder), "dense")
    given = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image.numpy())[0]
    with torch.no_grad():
        np.testing.assert_allclose(given, network(image), atol=1e-4)


def test_pt2_with_preprocessing(folder):
    assert command("export", folder, "--format", "pt2", "--preprocess") == 0
    extra = {"prunekit.json": ""}
    program = torch.export.load(folder / "exports/slim-image.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["prunekit.json"])["preprocessing"])["inside"] is True
    assert not sum(subnormal_count(v.numpy()) for v in program.state_dict.values())
    image = np.random.default_rng(0).integers(0, 256, (21, 30, 3), np.uint8)
    wanted = Classification().predict(load_model(RunDir.open(folder), "slim"), image, 16)
    with torch.no_grad():
        np.testing.assert_allclose(program.module()(torch.from_numpy(image)[None])[0], wanted, atol=1e-5)


def test_int8_reports_metrics(folder, capsys):
    assert command("export", folder, "--format", "onnx", "--int8") == 0
    assert "top1" in capsys.readouterr().out
    note = json.loads((folder / "summary.json").read_text())["export"]["int8"]
    assert note["images"] > 100 and 0 <= note["int8"]["top1"] <= 1 and note["calibration"] == 64
    file = (folder / "exports/slim-int8.onnx").read_bytes()
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load_from_string(file).graph.node)
    assert onnx_function(file)(np.zeros((3, 3, 18, 16), np.float32)).shape == (3, 10)


def test_file_that_computes_something_else_is_not_written(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "prunekit.pipeline.export.deploy",
        lambda model, *_, **__: (torch.nn.Sequential(model, torch.nn.ReLU()), NoRecord),
    )
    assert command("export", folder, "--format", "onnx") == 3
    error = capsys.readouterr().err
    assert "differs from the model" in error and error.count("\n") == 1
    assert not (folder / "model.onnx").exists()


def test_invalid_options(folder, capsys):
    for words, *arguments in (
        (["onx", "'onnx'"], "--format", "onx"),
        (["--model thin"], "--format", "onnx", "--model", "thin"),
        (["--plain"], "--format", "csnet", "--plain"),
        (["--int8", "onnx"], "--format", "pt2", "--int8"),
        (["--int8", "--preprocess"], "--format", "onnx", "--int8", "--preprocess"),
        (["seed=3", "data.root"], "--format", "onnx", "seed=3"),
    ):
        assert command("export", folder, *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (folder / "exports").exists()


class Stem(nn.Module):
    """A classifier of 16×16 images whose head reads every position, or is pooled."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 9, 3, padding=1), head

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)))


def fixed_head():
    return nn.Sequential(nn.Flatten(), nn.Linear(9 * 16 * 16, 10))


def exporter(folder, model):
    """Export a model in place of that of a run; what it says is in the second value."""
    output = io.StringIO()
    run = RunDir.open(folder, write=True)
    reporter = Reporter(Console(file=output, width=1000))
    return Exporter(RunContext(read_recipe(run), reporter), run, "slim", model.eval(), measure=False), output


def properties(file):
    return {p.key: p.value for p in onnx.load_from_string(file).metadata_props}


@pytest.mark.parametrize("form", ["onnx", "openvino", "pt2"])
def test_model_of_one_size(folder, form):
    export, output = exporter(folder, Stem(fixed_head()))
    (path, *_) = export.write(Variant(form))
    export.run.close()
    assert "only for inputs of 16×16" in output.getvalue()
    if form == "onnx":
        assert json.loads(properties(path.read_bytes())["input"])["shape"] == ["N", 3, 16, 16]


def test_model_that_cannot_be_traced_is_exported_as_trained(folder):
    class Head(nn.Module):
        def forward(self, x):
            return (x if x.shape[2] > 4 else x * 2).mean((2, 3))

    export, output = exporter(folder, Stem(Head()))
    (path,) = export.write(Variant("onnx"))
    export.run.close()
    assert "exported as it was trained, not deployed: torch.fx cannot trace" in output.getvalue()
    assert "slim model, plain" in output.getvalue() and properties(path.read_bytes())["form"] == "plain"


def test_free_sides_have_names_with_preprocessing_too(folder):
    export, output = exporter(folder, Stem(fixed_head()))
    (path,) = export.write(Variant("onnx", preprocess=True))
    export.run.close()
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["N", "H", "W", 3]
    assert json.loads(properties(path.read_bytes())["input"])["shape"] == ["N", "H", "W", 3]
    assert "only for inputs" not in output.getvalue()


def test_size_without_padded_channels_is_reported(folder):
    export, output = exporter(folder, Stem(nn.Conv2d(9, 9, 3, padding=1)))
    (path,) = export.write(Variant("onnx"))
    export.run.close()
    # The stem has 16 channels instead of 9, and so has the input of the head.
    padded = 4 * (7 * 3 * 9 + 7 + 9 * 7 * 9)
    size = path.stat().st_size
    assert (
        f"{size / 1000:.0f} kB ({(size - padded) / 1000:.0f} kB without the padding of channels)" in output.getvalue()
    )
    record = json.loads((folder / "summary.json").read_text())["export"]["deployed"]
    assert record["padded_bytes"] == padded


def test_without_paths_keeps_last_part():
    assert without_paths({"root": "/home/me/DUTS", "file": "/x/net.py#sha256=12", "n": [1, "timm/resnet18"]}) == {
        "root": "DUTS",
        "file": "net.py",
        "n": [1, "timm/resnet18"],
    }
