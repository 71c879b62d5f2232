"""Concurrent access to a run folder: a second writer is refused, and a reader finds intact files at any moment."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_run import change_state, write_run
from helpers.small_run import small_run
from rich.console import Console

from prunekit.cli import main
from prunekit.commands.groups import inspect_groups
from prunekit.commands.watch import read_snapshot
from prunekit.errors import RunFolderError
from prunekit.reporting import load_run
from prunekit.runs import artifacts
from prunekit.runs.run_dir import RunDir

HOLDER = """
import sys, time
from prunekit.runs.run_dir import RunDir
run = RunDir.open(sys.argv[1], write=True)
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def run(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def writers(run: Path) -> dict[str, list[str]]:
    return {
        "resume": ["run", str(run / "recipe.yaml"), "--out", str(run), "--resume"],
        "overwrite": ["run", str(run / "recipe.yaml"), "--out", str(run), "--overwrite"],
        "from": ["run", str(run / "recipe.yaml"), "--out", str(run), "--from", "slim"],
        "eval": ["eval", str(run), "--data", f"a={run}"],
        "export": ["export", str(run), "--format", "onnx"],
        "bench": ["bench", str(run)],
    }


@pytest.fixture
def holder(run):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_writer_is_refused_and_changes_nothing(run, holder, capsys):
    before = tree(run)
    for arguments in writers(run).values():
        error = refused(arguments, capsys)
        assert f"{run} is in use by process {holder.pid} on {socket.gethostname()}" in error, arguments
    assert tree(run) == before


def test_lock_of_dead_process_is_ignored(run, holder):
    holder.kill()
    holder.wait()
    assert json.loads((run / "lock").read_text())["pid"] == holder.pid
    RunDir.open(run, write=True).close()
    assert not (run / "lock").exists()


def test_lock_of_another_host_is_reported_with_remedy(run, capsys):
    (run / "lock").write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    for arguments in writers(run).values():
        error = refused(arguments, capsys)
        assert "process 7 on elsewhere" in error and f"if that process has ended, remove {run / 'lock'}" in error
    (run / "lock").unlink()
    RunDir.open(run, write=True).close()


def test_readers_work_during_a_run(run, holder):
    before = tree(run)
    assert load_run(run).problems == load_run(run).problems
    assert inspect_groups(str(run)).params and read_snapshot(run).status == "complete"
    assert tree(run) == before


@pytest.mark.parametrize("command, stage", [("slim", "train"), ("finetune", "slim")])
def test_unfinished_source_run_is_refused(run, holder, tmp_path, capsys, command, stage):
    done = ["train", "extract", "slim"]
    change_state(run, status="running", pid=holder.pid, host=socket.gethostname(), done=done[: done.index(stage)])
    error = refused([command, str(run), "--out", str(tmp_path / "new")], capsys)
    assert f"process {holder.pid} on {socket.gethostname()}, which has not finished the stage {stage}" in error
    assert not (tmp_path / "new").exists()
    # Later stages do not change it.
    change_state(run, done=done[: done.index(stage) + 1])
    assert RunDir.open(run).require_done(stage).path == run
    holder.kill()
    holder.wait()
    change_state(run, done=[])
    assert RunDir.open(run).require_done(stage).path == run, "no process uses it"


# ---- a reader at any moment


def test_reader_finds_intact_files_between_any_two_writes(tmp_path, monkeypatch):
    """Read before and after each write, with the current state and with one read earlier."""
    whole, looked, begun = artifacts.write_atomic, [], {}

    def watched(path: Path, data: bytes) -> None:
        glance()
        whole(path, data)
        glance()

    def glance() -> None:
        folder = tmp_path / "run"
        if not (folder / "recipe.yaml").is_file():
            return
        readers = [RunDir.open(folder), *begun.values()]
        for reader in readers:
            for name in reader.recorded_files():
                reader.read_bytes(name)
        begun.update(before=readers[0])
        read_snapshot(folder)
        looked.append([line for line in load_run(folder).problems if not line.endswith(": missing")])

    monkeypatch.setattr(artifacts, "write_atomic", watched)
    write_run(tmp_path / "run", units=("block",))
    assert len(looked) > 60 and not any(looked)


WRITER = """
import itertools, sys
from pathlib import Path
import numpy as np
from prunekit.runs.run_dir import RunDir
run = RunDir.open(sys.argv[1], write=True)
print("ready", flush=True)
for number in itertools.count():
    if number >= 60 and Path(sys.argv[2]).exists():
        break
    run.update_summary("drift", {"max_abs_diff": number, "mean_abs_diff": number})
    run.write_json("slim/plan.json", {"format": 1, "groups": {"a": [number]}})
    run.write_arrays("gates.npz", {"norm": np.full((2, 50), number, np.float32)})
    run.append_metrics({"stage": "finetune", "epoch": 2 + number, "loss": 0.5, "metrics": {}})
run.close()
"""


def test_reader_during_concurrent_writes(tmp_path):
    run = write_run(tmp_path / "run", units=("block",))
    quiet = load_run(run).problems
    enough = tmp_path / "enough"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(run), str(enough)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    reader, looks = RunDir.open(run), 0
    while process.poll() is None:
        for name in ("summary.json", "slim/plan.json"):
            reader.read_json(name)
        reader.read_metrics()
        assert len(np.unique(reader.read_arrays("gates.npz").get("norm", np.zeros(1)))) == 1
        assert [line for line in load_run(run).problems if "damaged" in line] == quiet
        looks += 1
        if looks > 3:
            enough.touch()
    process.stdout.close()
    assert process.returncode == 0 and looks > 3


def test_report_marks_running_run(run, holder):
    from prunekit.reporting import report

    change_state(run, status="running", pid=holder.pid, host=socket.gethostname())
    console = Console(width=200, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(report.__globals__, "report_figures", lambda *_: iter(()))
        report([run], None, console)
    assert "(running)" in console.file.getvalue() and "problem in" not in console.file.getvalue()


def test_run_replaced_while_open_reads_the_new_one(run):
    reader = RunDir.open(run)
    recipe = reader.read_text("recipe.yaml")
    RunDir.start(run, recipe.replace("seed: 0", "seed: 1"), {}, overwrite=True).close()
    assert "seed: 1" in reader.read_text("recipe.yaml"), "the new one, verified by the new state"
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunDir.open(run / "dense")
