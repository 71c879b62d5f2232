"""Only what a run wrote is removed: by ``--overwrite``, ``--from`` and old checkpoints."""

from __future__ import annotations

import pytest

from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES
from prunekit.utils import io

RECIPE = "name: tiny\nseed: 0\n"


@pytest.fixture
def run(tmp_path):
    with RunDir.start(tmp_path / "run", RECIPE, {}) as made:
        yield made


USERS = (
    "notes.txt",
    "model.txt",
    "recipe.json",
    ".git/HEAD",
    ".git/.tmp-1-ab",
    "src/dense/model.safetensors",
    ".tmp-mine",
    "gallery/mine.png",
    "exports/mine.onnx",
    "report/mine.md",
    "report/plot.png",
    "checkpoints/train-best.safetensors",
    "checkpoints/train-0001-copy.json",
    "dense/README",
    "tensorboard/notes",
)
RUNS = (
    "gallery/0001-image.png",
    "exports/slim-plain.onnx",
    "exports/csnet.pth.tar",
    "report/channels.png",
    "report/channels.svg",
    "report/index.html",
    "run.log",
    "tensorboard/train/events.out.tfevents.1.host",
    "finetuned/model.safetensors",
    f"extract/{io.TEMP_PREFIX}12-0a1b2c3d",
)


def add_files(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("damage", [None, "state.json", "summary.json"])
def test_overwrite_keeps_the_users_files(run, damage):
    run.write_text("anything/recorded.txt", "written by the run")
    run.write_text("dense/model.safetensors", "old")
    run.save_checkpoint("train", 1, {}, {}, keep=2)
    run.close()
    add_files(run.path, (*USERS, *RUNS))
    (run.path / "shortcut").symlink_to("src")
    if damage:
        (run.path / damage).write_text("damaged")
    with RunDir.start(run.path, RECIPE, {}, overwrite=True):
        left = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    start = {"recipe.yaml", "environment.json", "summary.json", "state.json", "lock"}
    assert left - start - {"anything/recorded.txt"} == set(USERS)
    assert all((run.path / name).read_text() == name for name in USERS) and (run.path / "shortcut").is_symlink()
    assert not (run.path / "finetuned").exists() and not (run.path / "extract").exists()


def test_overwrite_removes_links_in_place_of_folders(run, tmp_path):
    run.close()
    add_files(tmp_path / "outside", ("model.safetensors", "keep.txt"))
    (run.path / "dense").symlink_to(tmp_path / "outside")
    RunDir.start(run.path, RECIPE, {}, overwrite=True).close()
    assert not (run.path / "dense").exists()
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == ["keep.txt", "model.safetensors"]


def test_kill_while_overwriting_leaves_a_run(run, monkeypatch):
    run.close()
    add_files(run.path, USERS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "_create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        RunDir.start(run.path, RECIPE, {}, overwrite=True)
    for flags in ({"resume": True}, {"overwrite": True}):
        with RunDir.start(run.path, RECIPE, {}, **flags) as again:
            assert again.done == []
    assert (run.path / "notes.txt").is_file()


def test_restart_keeps_the_users_files(run):
    for stage in STAGES[:5]:
        run.end(stage)
    add_files(run.path, USERS)
    run.write_bytes("gallery/0001-image.png", b"old")
    run.write_bytes("exports/other.onnx", b"old")
    run.restart_from("evaluate")
    assert all((run.path / name).read_text() == name for name in USERS)
    assert not (run.path / "gallery/0001-image.png").exists() and not (run.path / "exports/other.onnx").exists()


def test_checkpoints_of_the_user_stay(run):
    add_files(run.path, ("checkpoints/train-best.safetensors", "checkpoints/train-0007.safetensors"))
    run.save_checkpoint("train", 8, {}, {}, keep=1)
    names = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert names == {"train-best.safetensors", "train-0008.safetensors", "train-0008.json"}
