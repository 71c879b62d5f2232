"""Life cycle of a run folder: start, resume, locks, stages."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prunekit import __version__
from prunekit.config.recipe import load
from prunekit.errors import CheckpointError, RunFolderError
from prunekit.runs.run_dir import FORMAT, RunDir
from prunekit.runs.stage_order import STAGES
from prunekit.utils import io, lock

RECIPE = "name: tiny\nseed: 0\ntrain:\n  lr: 1e-3\n"


@pytest.fixture
def run(tmp_path):
    with RunDir.start(tmp_path / "run", RECIPE, {"threads": 1}) as made:
        yield made


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def leftovers(path: Path) -> list[Path]:
    return list(path.rglob(f"{io.TEMP_PREFIX}*"))


# ---- start


def test_start_writes_initial_files(run):
    assert run.read_text("recipe.yaml") == RECIPE
    assert run.read_json("environment.json") == {"threads": 1}
    assert run.read_json("summary.json") == {"format": 2, "recipe": "tiny", "status": "running"}
    state = json.loads((run.path / "state.json").read_text())
    assert {**state, "checksums": set(state["checksums"])} == {
        "format": FORMAT,
        "prunekit": __version__,
        "run": state["run"],
        "stage": None,
        "status": "running",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "done": [],
        "checksums": {"recipe.yaml", "environment.json", "summary.json"},
        "check": state["check"],
    }


def test_existing_run_is_refused_with_three_options(run):
    run.close()
    with pytest.raises(RunFolderError) as error:
        RunDir.start(run.path, RECIPE, {})
    assert all(way in one_line(error) for way in ("--resume", "--overwrite", "--out DIR"))
    assert not (run.path / "lock").exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["photo.jpg", "recipe.yaml"])
def test_folder_without_run_is_not_touched(tmp_path, name, options):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunFolderError) as error:
        RunDir.start(tmp_path, RECIPE, {}, **options)
    assert "no run" in one_line(error)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]


def test_file_in_place_of_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError) as error:
        RunDir.start(tmp_path / "run", RECIPE, {})
    assert "--out DIR" in one_line(error)


def test_overwrite_removes_the_old_run(run):
    run.write_text("gallery/a.txt", "old")
    run.end("train")
    run.close()
    with RunDir.start(run.path, "name: other\n", {}, overwrite=True) as new:
        assert new.done == [] and not (run.path / "gallery").exists()
        assert new.read_json("summary.json")["recipe"] == "other"


def test_overwrite_does_not_follow_links(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep.txt").write_text("keep")
    (run.path / "link").symlink_to(outside)
    run.close()
    RunDir.start(run.path, RECIPE, {}, overwrite=True).close()
    assert (outside / "keep.txt").read_text() == "keep" and not (run.path / "link").exists()


def test_resume_keeps_existing_results(run):
    run.begin("train")
    run.end("train")
    run.add_seconds("train", 2.0)
    (run.path / f"{io.TEMP_PREFIX}1-dead").write_text("half")
    run.close()
    with RunDir.start(run.path, RECIPE, {"threads": 2}, resume=True) as again:
        again.add_seconds("train", 1.5)
        assert again.done == ["train"]
        assert again.read_json("environment.json") == {"threads": 2}
        assert again.read_json("summary.json")["seconds"] == {"train": 3.5}
    assert not leftovers(run.path)


def test_resume_with_another_recipe_shows_diff(run):
    run.close()
    with pytest.raises(RunFolderError) as error:
        RunDir.start(run.path, RECIPE.replace("1e-3", "1e-2"), {}, resume=True)
    assert "-  lr: 1e-3\n+  lr: 1e-2" in str(error.value)
    assert "seed" not in str(error.value)
    assert run.read_text("recipe.yaml") == RECIPE


def test_long_diff_is_truncated(run):
    run.close()
    with pytest.raises(RunFolderError) as error:
        RunDir.start(run.path, "\n".join(f"key{i}: {i}" for i in range(200)), {}, resume=True)
    assert len(str(error.value).splitlines()) < 16 and str(error.value).endswith("…")


@pytest.mark.parametrize("left", [[], ["state.json"], ["state.json", "environment.json", "summary.json", "lock"]])
def test_resume_without_run_starts_one(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("")
    with RunDir.start(tmp_path, RECIPE, {}, resume=True) as run:
        assert run.done == [] and run.read_text("recipe.yaml") == RECIPE


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(RunFolderError):
        RunDir.start(tmp_path, RECIPE, {}, resume=True, overwrite=True)


# ---- lock

HOLDER = """
import sys, time
from prunekit.runs.run_dir import RunDir
run = RunDir.start(sys.argv[1], sys.argv[2], {})
run.begin("train")
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "held"), RECIPE], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_second_process_is_refused_with_owner(holder, tmp_path, options):
    with pytest.raises(RunFolderError) as error:
        RunDir.start(tmp_path / "held", RECIPE, {}, **options)
    assert str(holder.pid) in one_line(error) and socket.gethostname() in one_line(error)
    assert RunDir.open(tmp_path / "held").status == "running"


def test_killed_run_is_interrupted_and_its_lock_stale(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "held" / "lock").exists()
    assert RunDir.open(tmp_path / "held").status == "interrupted"
    with RunDir.start(tmp_path / "held", RECIPE, {}, resume=True) as run:
        assert run.status == "running"
    assert not (tmp_path / "held" / "lock").exists()


def test_lock_of_another_host_is_not_stale(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(RunFolderError) as error:
        RunDir.start(tmp_path, RECIPE, {})
    assert "elsewhere" in one_line(error) and str(tmp_path / "lock") in one_line(error)


def test_without_flock_the_process_id_decides(tmp_path, monkeypatch, run):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with pytest.raises(RunFolderError):
        RunDir.start(run.path, RECIPE, {}, resume=True)
    (tmp_path / "dead").mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "dead" / "lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    RunDir.start(tmp_path / "dead", RECIPE, {}).close()


def test_same_process_cannot_lock_twice(run):
    with pytest.raises(RunFolderError):
        RunDir.open(run.path, write=True)
    run.close()
    RunDir.open(run.path, write=True).close()


# ---- open


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_open_without_run_is_refused(tmp_path, name):
    with pytest.raises(RunFolderError) as error:
        RunDir.open(tmp_path / name)
    assert "not a run folder" in one_line(error)


@pytest.mark.parametrize("name", ["state.json", "summary.json"])
def test_newer_format_is_refused_with_required_version(run, name):
    run.close()
    written = json.loads((run.path / name).read_text())
    (run.path / name).write_text(json.dumps({**written, "format": FORMAT + 1, "prunekit": "9.1"}))
    for how in (lambda: RunDir.open(run.path), lambda: RunDir.start(run.path, RECIPE, {}, resume=True)):
        with pytest.raises(RunFolderError) as error:
            how()
        assert "9.1" in one_line(error)


def test_folder_open_for_reading_cannot_be_written(run):
    run.close()
    reader = RunDir.open(run.path)
    for write in (
        lambda: reader.write_text("a", ""),
        lambda: reader.append_metrics({}),
        lambda: reader.begin("train"),
        lambda: reader.save_checkpoint("train", 1, {}, {}, 1),
    ):
        with pytest.raises(RunFolderError):
            write()


def test_damaged_state_is_named(run):
    run.close()
    (run.path / "state.json").write_text('{"format": 1')
    with pytest.raises(CheckpointError) as error:
        RunDir.open(run.path)
    assert "--overwrite" in one_line(error)


# ---- exit


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "interrupted"), (KeyboardInterrupt, "interrupted"), (ValueError, "failed"), (SystemExit, "failed")],
)
def test_exit_sets_status(tmp_path, raised, status):
    def leave():
        with RunDir.start(tmp_path, RECIPE, {}):
            if raised:
                raise raised

    if raised:
        with pytest.raises(raised):
            leave()
    else:
        leave()
    after = RunDir.open(tmp_path)
    assert after.status == after.read_json("summary.json")["status"] == status
    assert not (tmp_path / "lock").exists()


def test_exit_after_last_stage_sets_complete(tmp_path):
    with RunDir.start(tmp_path, RECIPE, {}) as run:
        for stage in STAGES:
            run.begin(stage)
            run.end(stage)
    after = RunDir.open(tmp_path)
    assert after.status == after.read_json("summary.json")["status"] == "complete"
    with RunDir.open(tmp_path, write=True) as run:
        run.write_json("bench.json", {})
    assert RunDir.open(tmp_path).status == "complete"


def test_full_disk_does_not_hide_first_error(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), RunDir.start(tmp_path, RECIPE, {}):
        monkeypatch.setattr(io.os, "replace", failing)
        raise ZeroDivisionError
    monkeypatch.undo()
    assert not (tmp_path / "lock").exists()


# ---- stages


def test_restart_removes_this_and_later_stages(run):
    for stage in STAGES[:4]:
        run.begin(stage)
        run.end(stage)
        run.add_seconds(stage, 1.0)
    for stage in ("train", "finetune"):
        run.save_checkpoint(stage, 1, {"w": np.ones(1)}, {}, 1)
        run.append_metrics({"stage": stage, "epoch": 1})
    run.restart_from("slim")
    assert run.done == ["train", "extract"]
    assert run.latest_checkpoint("finetune") is None and run.latest_checkpoint("train") == 1
    assert [m["stage"] for m in run.read_metrics()] == ["train"]
    assert run.read_json("summary.json")["seconds"] == {"train": 1.0, "extract": 1.0}


def test_restart_requires_earlier_stages(run):
    run.end("train")
    with pytest.raises(RunFolderError) as error:
        run.restart_from("slim")
    assert "extract" in one_line(error)
    with pytest.raises(RunFolderError) as error:
        run.restart_from("slimm")
    assert all(stage in one_line(error) for stage in STAGES)


def failing(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_resume_accepts_older_recipe_and_other_on_nonfinite(tmp_path):
    old = load("csnet").dump()
    lines = [line for line in old.splitlines(keepends=True) if "accumulate" not in line and "sync_norms" not in line]
    RunDir.start(tmp_path / "run", "".join(lines), {}).close()
    now = load("csnet", ["train.on_nonfinite=skip"]).dump()
    with RunDir.start(tmp_path / "run", now, {}, resume=True) as run:
        assert run.read_text("recipe.yaml") == now
    with pytest.raises(RunFolderError, match="another recipe"):
        RunDir.start(tmp_path / "run", load("csnet", ["train.accumulate=2"]).dump(), {}, resume=True)


def test_the_nearest_run_folder_is_proposed(run):
    with pytest.raises(RunFolderError, match=rf"is not a run folder .*; did you mean {run.path}\?"):
        RunDir.open(run.path.with_name("rnu"))
