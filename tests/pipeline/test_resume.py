"""What may change between a run and its resumption, and what a failed export costs."""

import json
import shutil

import pytest
from helpers.marks import slow
from helpers.toy_run import killed_in, outcome, quiet, shorten, toy_recipe, write_photos

from prunekit.errors import CheckpointError, ExportError, RunError, RunFolderError
from prunekit.pipeline import export
from prunekit.pipeline.runner import finetune_run, run_recipe
from prunekit.runs.run_dir import RunDir


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def failing(*_):
    raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")


@pytest.mark.parametrize("error", [failing, lambda *_: (_ for _ in ()).throw(ExportError("no such operator"))])
def test_failed_export_does_not_cost_the_report(tmp_path, photos, monkeypatch, error):
    out, recipe = tmp_path / "run", toy_recipe(photos, "export.preprocess=true")
    with monkeypatch.context() as patch, pytest.raises(ExportError) as failure:
        patch.setattr(export, "check_onnx", error)
        run_recipe(recipe, out, quiet())
    reason = r"RuntimeError: mat1 and mat2 shapes" if error is failing else "no such operator"
    message = str(failure.value)
    assert message.count("\n") == 0 and message.count(reason) == 2 and failure.value.exit_status == 3
    assert "model.onnx" in message and "--resume export.onnx=false" in message
    run = RunDir.open(out)
    assert run.status == "complete" and run.done == ["train", "extract", "slim", "finetune", "evaluate", "report"]
    assert (out / "report/summary.csv").is_file() and not (out / "model.onnx").exists()
    run_recipe(recipe, out, quiet(), resume=True)
    assert RunDir.open(out).is_done("export") and (out / "model.onnx").is_file()


def test_variants_are_exported_that_can_be(tmp_path, photos, monkeypatch):
    def only_plain(file, reference, inputs, path):
        return failing() if path == "model.onnx" else 0.0

    monkeypatch.setattr(export, "check_onnx", only_plain)
    with pytest.raises(ExportError, match=r"^export: model\.onnx: RuntimeError"):
        run_recipe(toy_recipe(photos, "export.preprocess=true"), tmp_path / "run", quiet())
    assert (tmp_path / "run/exports/finetuned-image.onnx").is_file()


def test_failed_export_of_a_derived_run(tmp_path, photos, monkeypatch):
    run_recipe(toy_recipe(photos, "export.onnx=false"), tmp_path / "run", quiet())
    monkeypatch.setattr(export, "check_onnx", failing)
    with pytest.raises(ExportError):
        finetune_run(tmp_path / "run", toy_recipe(photos), tmp_path / "tuned", quiet())
    assert (tmp_path / "tuned/report/summary.csv").is_file()


def test_export_keys_may_change_after_a_failed_export(tmp_path, photos, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ExportError):
        patch.setattr(export, "check_onnx", failing)
        run_recipe(toy_recipe(photos), out, quiet())
    run_recipe(toy_recipe(photos, "export.onnx=false"), out, quiet(), resume=True)
    assert RunDir.open(out).is_done("export") and not (out / "model.onnx").exists()


@pytest.mark.parametrize(
    ("place", "replaced"),
    [
        *[("append_metrics", False), slow("append_metrics", True), slow("update_summary", False)],
        *[("update_summary", True), ("end", False), slow("end", True)],
    ],
)
def test_folder_moved_during_the_run(tmp_path, photos, monkeypatch, place, replaced):
    out, moved = tmp_path / "run", tmp_path / "moved"
    call = getattr(RunDir, place)

    def move(run, *args):
        if not moved.exists() and run.is_done("train") == (place == "end"):
            out.rename(moved)
            if replaced:
                out.mkdir()
                (out / "lock").write_text("of another process")
        return call(run, *args)

    with monkeypatch.context() as patch, pytest.raises(RunError, match=f"moved to {moved}; .* --out {moved}$"):
        patch.setattr(RunDir, place, move)
        run_recipe(toy_recipe(photos), out, quiet())
    left = [path.name for path in out.iterdir() if path.name != "run.log"] if out.exists() else []
    assert left == (["lock"] if replaced else [])
    run_recipe(toy_recipe(photos), moved, quiet(), resume=True)
    assert RunDir.open(moved).status == "complete"


@pytest.mark.parametrize("epoch", [1, 2])
def test_data_may_move(tmp_path, photos, epoch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_recipe(toy_recipe(photos), whole, quiet())
    with killed_in(epoch):
        run_recipe(toy_recipe(photos), out, quiet())
    moved = photos.rename(tmp_path / "elsewhere")
    run_recipe(toy_recipe(moved), out, quiet(), resume=True)
    name = "finetuned/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert f"root: {moved}" in (out / "recipe.yaml").read_text()


def test_other_data_are_refused(tmp_path, photos):
    out, other = tmp_path / "run", tmp_path / "other"
    run_recipe(toy_recipe(photos), out, quiet())
    shutil.copytree(photos, other)
    # Where nothing is left to train, too.
    run_recipe(toy_recipe(other), out, quiet(), resume=True)
    (photos / "dark/dark3.png").write_bytes((photos / "light/light3.png").read_bytes())
    recipe = (out / "recipe.yaml").read_bytes()
    with pytest.raises(RunFolderError, match=r"other data: .* in data\.root differ"):
        run_recipe(toy_recipe(photos), out, quiet(), resume=True)
    (out / "data.json").unlink()
    with pytest.raises(CheckpointError, match=r"data\.json is missing"):
        run_recipe(toy_recipe(photos), out, quiet(), resume=True)
    assert (out / "recipe.yaml").read_bytes() == recipe


def test_stages_may_be_repeated(tmp_path, photos):
    out = tmp_path / "run"
    run_recipe(toy_recipe(photos), out, quiet())
    before = outcome(out)
    for stage in ("extract", "finetune", "export", "report"):
        run_recipe(toy_recipe(photos), out, quiet(), resume=True, start_from=stage)
        assert outcome(out) == before
