"""A complete saliency run with a tiny model, and the commands that read its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.small_run import BY_THRESHOLD, skip_export
from PIL import Image
from rich.console import Console

from prunekit.commands.predict import predict
from prunekit.config.recipe import load
from prunekit.errors import DataError, RecipeError, RunFolderError
from prunekit.pipeline.models import load_model
from prunekit.pipeline.runner import finetune_run, run_recipe, slim_run
from prunekit.reporting import load_run
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES

REAL = Path(__file__).parents[2].parent / "shared" / "data"
QUICK = [
    *BY_THRESHOLD,
    "backbone.options={width: 10, blocks: [1, 2, 2, 1]}",
    "data.size=32",
    "data.options={train: 24, val: 9}",
    "train.epochs=2",
    "train.batch_size=8",
    "train.gate_lr=0.1",
    "decay.weight=0.1",
    "slim.threshold=0.75",
    "finetune.epochs=1",
    "finetune.batch_size=8",
]


def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    run_recipe(load("csnet", QUICK), out, quiet())
    return out


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "toy"))


@pytest.fixture
def without_export(monkeypatch):
    """Skip the export, which takes longest and is part of the complete run."""
    skip_export(monkeypatch)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_summary_entries(whole):
    summary = summary_of(whole)
    assert summary["format"] == 2 and summary["recipe"] == "csnet" and summary["status"] == "complete"
    for part in ("dense", "slim", "finetuned"):
        assert set(summary[part]) == {"params", "macs", "paper_flops", "metrics"}
        assert set(summary[part]["metrics"]) == {"max_f", "mae", "s_measure", "max_e"}
    assert summary["slim"]["params"] < summary["dense"]["params"]
    assert summary["slim"]["params"] == summary["finetuned"]["params"]
    kept = summary["kept"]
    assert 0 < kept["channels"] < kept["of"]
    assert kept["params_ratio"] == summary["slim"]["params"] / summary["dense"]["params"]
    equivalence = summary["equivalence"]
    assert (
        equivalence["passed"]
        and equivalence["max_abs_diff"] <= equivalence["tolerance"]
        and len(equivalence["inputs"]) >= 2
    )
    assert set(summary["drift"]) == {"max_abs_diff", "mean_abs_diff"}
    assert set(summary["reference"]) == {"constant", "centre", "colour"}
    assert summary["skipped"] == {"train": 0, "val": 0}
    assert set(summary["seconds"]) == set(STAGES)
    assert summary["export"]["path"] == "model.onnx"


def test_folder_content(whole):
    for name in (
        "recipe.yaml environment.json state.json metrics.jsonl gates.npz layers.json curves.json "
        "extract/plan.json slim/plan.json finetuned/plan.json "
        "model.onnx run.log dense/model.safetensors slim/model.safetensors finetuned/model.safetensors "
        "report/summary.csv report/summary.md report/layers.csv report/channels.png "
        "report/params_macs.svg gallery/index.json"
    ).split():
        assert (whole / name).stat().st_size > 0, name
    assert set(json.loads((whole / "curves.json").read_text())) == {"dense", "slim", "finetuned"}
    gallery = json.loads((whole / "gallery/index.json").read_text())
    assert sum(entry["fixed"] for entry in gallery) == 9
    for entry in gallery:
        for kind in ("image", "truth", "dense", "slim", "finetuned"):
            assert (whole / f"gallery/{entry['index']:04d}-{kind}.png").is_file()
    assert load(whole / "recipe.yaml") == load("csnet", QUICK)


def test_layers_and_plan_agree(whole):
    plan = json.loads((whole / "slim/plan.json").read_text())
    rows = json.loads((whole / "layers.json").read_text())["layers"]
    after = {(row["layer"], row["branch"]): row["channels"]["after"] for row in rows}
    for layer, split in plan["splits"].items():
        assert [after[layer, b] for b in range(len(split))] == split
    assert sum(row["params"]["after"] for row in rows) == summary_of(whole)["slim"]["params"]
    assert plan["builder"] == {
        "name": "csnet",
        "options": {"width": 10, "split": [0.5, 0.5], "blocks": [1, 2, 2, 1]},
        "file": None,
    }


def test_models_load_from_folder(whole):
    run = RunDir.open(whole)
    sizes = [sum(p.numel() for p in load_model(run, name).parameters()) for name in ("dense", "slim", "finetuned")]
    summary = summary_of(whole)
    assert sizes == [summary[name]["params"] for name in ("dense", "slim", "finetuned")]


def test_resume_of_complete_run_changes_nothing(run):
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    run_recipe(load("csnet", QUICK), run, quiet(), resume=True)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_overwriting_a_complete_run_leaves_none_of_its_files(run):
    (run / "report/notes.txt").write_text("the user's")
    with RunDir.start(run, load("csnet", QUICK).dump(), {}, overwrite=True):
        left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {"recipe.yaml", "environment.json", "summary.json", "state.json", "lock", "report/notes.txt"}


@pytest.mark.slow
def test_repeated_stages_give_same_result(run, without_export):
    before = {
        name: (run / name).read_bytes()
        for name in ("extract/plan.json", "slim/plan.json", "finetuned/model.safetensors")
    }
    metrics = summary_of(run)["finetuned"]
    run_recipe(load("csnet", QUICK), run, quiet(), resume=True, start_from="extract")
    assert {name: (run / name).read_bytes() for name in before} == before
    assert summary_of(run)["finetuned"] == metrics


def test_interrupted_run_resumes_to_same_result(tmp_path, whole, monkeypatch, without_export):
    from prunekit.pipeline import runner

    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setitem(runner.STAGE_FUNCTIONS, "slim", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load("csnet", QUICK), out, quiet())
    assert summary_of(out)["status"] == "interrupted"
    run_recipe(load("csnet", QUICK), out, quiet(), resume=True)
    for name in ("dense", "slim", "finetuned"):
        assert (out / name / "model.safetensors").read_bytes() == (whole / name / "model.safetensors").read_bytes()
    assert summary_of(out)["status"] == "complete"


@pytest.mark.parametrize("command", [slim_run, finetune_run, None])
def test_source_run_is_never_overwritten(run, command):
    recipe = load(run / "recipe.yaml")
    with pytest.raises(RunFolderError, match="is the run to begin from"):
        if command is None:
            run_recipe(load(run / "recipe.yaml", [f"init={run}"]), run, quiet(), overwrite=True)
        else:
            command(run, recipe, run.parent / "." / run.name, quiet(), overwrite=True)
    assert (run / "dense/model.safetensors").is_file()


def test_existing_run_is_not_touched(run):
    before = (run / "summary.json").read_bytes()
    with pytest.raises(RunFolderError, match=r"--resume.*--overwrite.*--out"):
        run_recipe(load("csnet", QUICK), run, quiet())
    with pytest.raises(RunFolderError, match=r"another recipe[\s\S]*epochs: 3"):
        run_recipe(load("csnet", [*QUICK, "train.epochs=3"]), run, quiet(), resume=True)
    assert (run / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    "override, word",
    [
        ("backbone.options.width=1", "width=1 must be at least 8"),
        ("train.augment={name: crop_flip, options: {crop: -1}}", "train.augment"),
        ("finetune.schedule={name: step, options: {factor: 7}}", "finetune.schedule"),
        ("train.optimizer={name: adam, options: {betas: [2, 3]}}", "train.optimizer"),
        ("data.options.train=0", "must be at least 1"),
    ],
)
def test_invalid_options_leave_no_folder(tmp_path, override, word):
    with pytest.raises((RecipeError, DataError), match=word):
        run_recipe(load("csnet", [*QUICK, override]), tmp_path / "run", quiet())
    assert not (tmp_path / "run").exists()


def test_predicted_maps_have_image_size(whole, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    sizes = {"a.b": (61, 40), "c": (33, 90), "grey": (32, 32)}
    for name, size in sizes.items():
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
        (picture.convert("L") if name == "grey" else picture).save(photos / f"{name}.png")
    (photos / "notes.txt").write_text("no image")
    written = predict(whole, [photos], tmp_path / "maps", console=quiet())
    assert {path.name: Image.open(path).size for path in written} == {f"{k}.png": v for k, v in sizes.items()}
    assert all(Image.open(path).mode == "L" for path in written)


def test_unreadable_image_is_named_and_others_predicted(whole, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (20, 30)).save(good)
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png"):
        predict(whole, [bad, good], tmp_path / "maps", console=quiet())
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["good.png"]
    with pytest.raises(DataError, match="does not exist"):
        predict(whole, [tmp_path / "none.png"], tmp_path / "maps", console=quiet())
    with pytest.raises(RecipeError, match="has no such model; it has dense, slim"):
        predict(whole, [good], tmp_path / "maps", "thin", console=quiet())


def test_report_needs_only_the_folder(whole):
    run = load_run(whole)
    assert not run.problems and len(run.metrics) == 3 and len(run.layers) == 19


@pytest.mark.skipif(not REAL.is_dir(), reason="the photographs for tests are not beside this checkout")
def test_real_photographs(tmp_path, without_export):
    """Real pairs: some masks are RGB, 1-bit or graded, and sizes vary."""
    out = tmp_path / "real"
    overrides = [o for o in QUICK if not o.startswith("data.")]
    folders = [f"data.root={REAL}/DUTS-TR-mini", f"data.val_root={REAL}/DUTS-TR-mini"]
    run_recipe(
        load(
            "csnet", [*overrides, "data.name=folder", "data.size=32", *folders, "train.epochs=1", "slim.threshold=0.7"]
        ),
        out,
        quiet(),
    )
    summary = summary_of(out)
    assert summary["status"] == "complete" and summary["equivalence"]["passed"]
    assert np.isfinite(list(summary["finetuned"]["metrics"].values())).all()
