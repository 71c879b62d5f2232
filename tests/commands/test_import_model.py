import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import init_norms
from helpers.small_run import skip_export
from PIL import Image

from prunekit.backbones.csnet import csnet
from prunekit.cli import main
from prunekit.interop.csnet import export_csnet
from prunekit.interop.pickles import write_checkpoint, write_layout
from prunekit.pipeline.models import load_model
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.slim import slim
from prunekit.runs.run_dir import RunDir

QUICK = [
    "data={name: salient_shapes, size: 32, options: {train: 16, val: 8}}",
    "finetune.epochs=1",
    "finetune.batch_size=8",
    "export.onnx=false",
]


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code, capsys.readouterr().err


def summary_of(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A slim and a dense model as published files."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = csnet(20)
    example = init_norms(model)
    (folder / "dense.pth.tar").write_bytes(write_checkpoint(export_csnet(model)[0]))
    groups = find_groups(model, example)
    small, _ = slim(model, extract(model, groups, threshold=0.7), example, groups=groups)
    state, layout = export_csnet(small)
    (folder / "slim.pth.tar").write_bytes(write_checkpoint(state))
    (folder / "slim.bin").write_bytes(write_layout(layout.dump()))
    return folder


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "published"
    run("import", "csnet", published / "slim.pth.tar", published / "slim.bin", "--out", out)
    return out


@pytest.fixture
def folder(imported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(imported, tmp_path / "published"))


def test_imported_run_folder(imported):
    summary = summary_of(imported)
    assert set(summary) == {"format", "recipe", "status", "slim"} and summary["status"] == "complete"
    assert set(summary["slim"]) == {"params", "macs", "paper_flops"}
    rows = json.loads((imported / "layers.json").read_text())["layers"]
    for key, value in summary["slim"].items():
        assert sum(row[key]["after"] for row in rows) == value
    assert sum(row["params"]["before"] for row in rows) == 210_985
    assert not list(imported.rglob("*.pth*")) and (imported / "slim/model.safetensors").is_file()


def test_dense_import(published, tmp_path, monkeypatch):
    skip_export(monkeypatch)
    run("import", "csnet", published / "dense.pth.tar", "--out", tmp_path / "dense")
    summary = summary_of(tmp_path / "dense")
    assert summary["dense"] == {"params": 210_985, "macs": 432_819_744, "paper_flops": 610_638_784}
    run("slim", tmp_path / "dense", *QUICK, "slim.threshold=0.8", "--out", tmp_path / "thin")
    thin = summary_of(tmp_path / "thin")
    assert thin["status"] == "complete" and thin["equivalence"]["passed"] and thin["kept"]["params_ratio"] < 1


def test_import_export_round_trip(folder, tmp_path):
    run("export", folder, "--format", "csnet")
    run("import", "csnet", folder / "exports/csnet.pth.tar", folder / "exports/csnet.bin", "--out", tmp_path / "again")
    for name in ("slim/model.safetensors", "layers.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    plans = [json.loads((path / "slim/plan.json").read_text()) for path in (folder, tmp_path / "again")]
    assert {**plans[0], "recipe_hash": 0} == {**plans[1], "recipe_hash": 0}


@pytest.mark.slow
def test_commands_on_an_imported_run(folder, tmp_path, monkeypatch):
    before = summary_of(folder)
    with monkeypatch.context() as patch:
        skip_export(patch)
        run("slim", folder, *QUICK, "slim.threshold=0.9")
        run("finetune", "published-slim", *QUICK)
        run("export", folder, "--format", "onnx")
    thin = summary_of("published-slim")
    # The same model, its MACs at the new size of the images.
    changed = {key: thin["dense"][key] for key in ("macs", "metrics")}
    assert thin["dense"] == {**before["slim"], **changed}
    assert thin["dense"]["macs"] < 0.05 * before["slim"]["macs"]
    assert thin["slim"]["params"] < thin["dense"]["params"] and thin["equivalence"]["passed"]
    tuned = summary_of("published-slim-finetuned")
    assert tuned["status"] == "complete" and set(tuned["finetuned"]["metrics"]) == {
        "max_f",
        "mae",
        "s_measure",
        "max_e",
    }
    assert tuned["finetuned"]["params"] == thin["slim"]["params"]
    weights = [
        load_model(RunDir.open(path), name)
        for path, name in (("published-slim", "slim"), ("published-slim-finetuned", "finetuned"))
    ]
    assert not torch.equal(weights[0].classifier.weight, weights[1].classifier.weight)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.png")
    run("predict", "published-slim-finetuned", tmp_path / "photo.png", "--out", tmp_path / "maps")
    assert summary_of(folder)["export"]["path"] == "model.onnx"
    run("report", folder, "published-slim", "published-slim-finetuned", "--out", tmp_path / "report")
    assert (tmp_path / "report/summary.csv").is_file()
    assert summary_of(folder)["slim"] == before["slim"]


def test_finetune_without_slim(folder, monkeypatch):
    skip_export(monkeypatch)
    run("finetune", folder, *QUICK, "--out", "tuned")
    tuned = summary_of("tuned")
    assert tuned["slim"]["params"] == tuned["finetuned"]["params"] == summary_of(folder)["slim"]["params"]
    assert "dense" not in tuned and "metrics" in tuned["slim"]


@pytest.mark.slow
def test_run_from_an_imported_model(folder):
    keys = [*QUICK, "train.epochs=1", "train.batch_size=8", "backbone.options.width=20", "slim.threshold=0.9"]
    run("run", "csnet", "init=published", *keys, "--out", "on")
    shutil.rmtree(folder)
    on = summary_of("on")
    assert on["status"] == "complete" and on["equivalence"]["passed"]
    assert on["slim"]["params"] < on["dense"]["params"] < 210_985
    run("run", "csnet", "init=published", *keys, "--out", "on", "--from", "extract")


def test_errors(folder, published, capsys, tmp_path):
    for words, *arguments in (
        (["--format onx", "'onnx'"], "export", folder, "--format", "onx"),
        (["import torch", "csnet"], "import", "torch", published / "slim.bin", "--out", "x"),
        (["slim.bin", "which no checkpoint needs"], "import", "csnet", published / "slim.bin", "--out", "x"),
        (
            ["dense.pth.tar", "Is it another file"],
            "import",
            "csnet",
            published / "slim.pth.tar",
            published / "dense.pth.tar",
            "--out",
            "x",
        ),
        (["--resume", "--overwrite"], "import", "csnet", published / "dense.pth.tar", "--out", folder),
        (["data.root"], "finetune", folder),
        (["slim.treshold", "threshold"], "slim", folder, *QUICK, "slim.treshold=3"),
        (["not a run folder"], "slim", tmp_path, *QUICK),
        (["init", "same"], "run", "csnet", "init=published", "backbone.options.width=40", *QUICK, "--out", "x"),
    ):
        status, error = fails(capsys, *arguments)
        assert status == 2 and error.count("\n") == 1, error
        assert all(word in error for word in words), (words, error)
    assert not Path("x").exists() and not Path("published-finetuned").exists()
