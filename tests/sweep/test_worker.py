import sys
import threading

import pytest

from prunekit.runs.run_dir import RunDir
from prunekit.sweep import worker
from prunekit.sweep.tasks import Task
from prunekit.sweep.worker import Outcome, is_done, run_task

TRIAL = Task("trial", ("seed=1",), None, None, (0,))
SHARED = Task("shared/abc", ("seed=1",), "extract", None, (0, 1))


def program(monkeypatch, tmp_path, script):
    """Let ``prunekit`` be a shell script."""
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def run(tmp_path, task, **options):
    return run_task(tmp_path / "sweep", "csnet", task, 3, **options)


def test_command_and_environment(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, 'echo "$* $OMP_NUM_THREADS $PWD"')
    assert run(tmp_path, TRIAL, cwd=str(tmp_path)) == Outcome("complete")
    log = (tmp_path / "sweep/logs/trial.log").read_text()
    expected = f"-m prunekit.cli run csnet seed=1 --out {tmp_path}/sweep/trial --resume 3 {tmp_path}\n"
    assert log == expected


def test_shared_run_is_marked_when_it_has_reached_its_stop(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, 'mkdir -p "$(dirname "$7")"; echo "$*"')
    assert not is_done(tmp_path / "sweep", SHARED)
    assert run(tmp_path, SHARED) == Outcome("complete") and is_done(tmp_path / "sweep", SHARED)
    assert (tmp_path / "sweep/logs/shared-abc.log").read_text().endswith("--resume --until extract\n")
    program(monkeypatch, tmp_path, "exit 1")  # is not called again
    assert run(tmp_path, SHARED) == Outcome("complete")


def test_failure_is_the_error_of_this_attempt(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, "echo prunekit: the loss is not finite; echo; exit 3")
    assert run(tmp_path, TRIAL) == Outcome("failed", "the loss is not finite")
    program(monkeypatch, tmp_path, "echo train 1/2; kill -9 $$")
    assert run(tmp_path, TRIAL) == Outcome("failed", "exit status -9")


@pytest.mark.parametrize("ignores", [False, True], ids=["saves a checkpoint", "does not end"])
def test_stop(monkeypatch, tmp_path, ignores):
    monkeypatch.setattr(worker, "_STOP_SECONDS", 0.3)
    trap = "trap '' TERM" if ignores else f"trap 'echo saved > {tmp_path}/saved; exit 130' TERM"
    program(monkeypatch, tmp_path, f"{trap}\ntouch {tmp_path}/started\nwhile :; do sleep 0.05; done")
    stop = threading.Event()

    def stop_when_started():
        while not (tmp_path / "started").exists():
            pass
        stop.set()

    threading.Thread(target=stop_when_started).start()
    assert run(tmp_path, TRIAL, stop=stop) == Outcome("interrupted")
    assert (tmp_path / "saved").exists() != ignores


def test_a_run_continues_a_copy_of_its_parent(monkeypatch, tmp_path):
    with RunDir.start(tmp_path / "sweep/shared/abc", "name: test\n", {}) as parent:
        parent.save_checkpoint("train", 1, {}, {"epoch": 1}, keep=1)
        (parent.path / "run.log").write_text("of the parent")
    program(monkeypatch, tmp_path, "exit 3")
    child = Task("trial", (), None, "shared/abc", (0,))
    run(tmp_path, child)
    assert not (tmp_path / "sweep/trial").exists()  # the parent has not reached its stop
    (tmp_path / "sweep/shared/abc.done").touch()
    (tmp_path / "sweep/.tmp-trial").mkdir()  # of an earlier, killed copy
    run(tmp_path, child)
    copied = RunDir.open(tmp_path / "sweep/trial")
    assert copied.latest_checkpoint("train") == 1 and not (copied.path / "run.log").exists()
    # An existing run is not replaced.
    copied.path.joinpath("mark").touch()
    run(tmp_path, child)
    assert (copied.path / "mark").exists() and not list((tmp_path / "sweep").glob(".tmp-*"))
