import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.fake_run import change_state
from rich.console import Console

from prunekit.cli import main
from prunekit.commands import watch as watching
from prunekit.commands.watch import FigureWriter, read_snapshot, watch
from prunekit.errors import PrunekitError, RunFolderError
from prunekit.runs.run_dir import RunDir

RECIPE = "name: toy\ntrain:\n  epochs: 4\nfinetune:\n  epochs: 2\nslim:\n  steps: 2\n  threshold: 0.1\n"
WRITER = """
import sys, time
from pathlib import Path
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES
from test_watch import RECIPE, line
with RunDir.start(sys.argv[1], RECIPE, {}) as run:
    print("begun", flush=True)
    for stage in STAGES:
        run.begin(stage)
        for epoch in {"train": (1, 2, 3, 4), "finetune": (1, 2)}.get(stage, ()):
            run.append_metrics(line(stage, epoch))
        while stage == STAGES[-1] and not Path(sys.argv[2]).exists():
            time.sleep(0.05)
        run.end(stage)
"""


def line(stage, epoch, **more):
    figures = {"loss": 2 / epoch, "penalty": 3.0, "lambda": 5.0, "lr": 0.1, "alive": 9 - epoch, "of": 9}
    return {"stage": stage, "epoch": epoch, "step": epoch, **figures, "metrics": {"mae": 0.1}, "seconds": 10.0, **more}


def started(path, *stages, epochs=0):
    """A run that has started these stages and is running in this process."""
    run = RunDir.start(path, RECIPE, {})
    for stage in stages:
        run.begin(stage)
    for epoch in range(1, epochs + 1):
        run.append_metrics(line("train", epoch))
    return run


def shown(run, width=80):
    """The output for a run folder or a snapshot."""
    console = Console(file=io.StringIO(), width=width)
    console.print(read_snapshot(run) if isinstance(run, Path) else run)
    return console.file.getvalue()


def ended_process():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def tree(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def drawn(monkeypatch):
    """The number of epochs at each drawing; nothing is drawn."""
    calls = []
    monkeypatch.setattr("prunekit.reporting.figures.training_figures", lambda run: calls.append(len(run.metrics)) or ())
    return calls


def test_run_before_its_first_epoch(tmp_path):
    with started(tmp_path / "run") as run:
        assert "run  running" in shown(run.path) and "no epoch has finished yet" in shown(read_snapshot(run.path))
        run.begin("train")
        text = shown(run.path)
        assert f"run  running  stage train, 1 of 7  process {os.getpid()}\n" in text and "train epoch 1/4" in text


def test_training_in_progress(tmp_path, monkeypatch):
    with started(tmp_path / "run", "train", epochs=2) as run:
        written = (run.path / "metrics.jsonl").stat().st_mtime
        monkeypatch.setattr(watching.time, "time", lambda: written + 4)
        snapshot = read_snapshot(run.path)
        (status,) = snapshot.trainings()
        # 20 s for the two remaining epochs minus the 4 s since; then two trainings of two epochs.
        assert (status.seconds_left, status.run_seconds_left) == (16, 56)
        assert (status.epoch, status.epochs, status.progress) == (3, 4, 0.5)
        text = shown(replace(snapshot, age=4.0))
        assert "train epoch 3/4 ━" in text and " 0:16 left\n" in text and "run ~0:56 left" in text
        assert "loss 1.000 █▁  penalty 3  λ 5  alive 7/9  mae 0.100 ▁▁" in text and "last epoch 0:04 ago" in text


def test_trainings_within_the_slim_stage(tmp_path):
    with started(tmp_path / "run", "train", "slim", epochs=4) as run:
        assert [status.seconds_left for status in read_snapshot(run.path).trainings()] == [None]
        run.append_metrics(line("step1", 1))
        first, second = read_snapshot(run.path).trainings()
        assert first.seconds_left is None and second.seconds_left > 0 and second.run_seconds_left > second.seconds_left
        text = shown(run.path)
        assert "train epoch 4/4  loss 0.500" in text and "step1 epoch 2/2 ━" in text
        run.begin("finetune")
        assert [status.stage for status in read_snapshot(run.path).trainings()] == ["train", "step1", "finetune"]
        assert [status.seconds_left for status in read_snapshot(run.path).trainings()] == [None] * 3


@pytest.mark.parametrize("width", [80, 40, 20])
def test_output_fits_the_terminal(tmp_path, width):
    path = tmp_path / ("a_long_name_" * 5)
    with started(path, "train", epochs=2) as run:
        text = shown(path, width)
        run.log = (path / "run.log").write_text("2026-01-01 00:00:00  " + "word " * 50)
        run.begin("slim")
        assert max(map(len, (text + shown(path, width)).splitlines())) <= width


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (None, {}, "complete\n"),
        (ValueError, {}, "failed in train\n"),
        (KeyboardInterrupt, {}, "interrupted in train  continue with --resume\n"),
        (
            KeyboardInterrupt,
            {"status": "running", "pid": ended_process()},
            "no longer exists  continue with --resume\n",
        ),
        (KeyboardInterrupt, {"status": "odd"}, "its state cannot be read\n"),
    ],
)
def test_finished_run_is_shown_once(tmp_path, error, state, message, drawn, capsys):
    try:
        with started(tmp_path / "run", "train", epochs=2) as run:
            (run.path / "run.log").write_text("2026-01-01 00:00:00  train: failed: no \x1b[31mluck\n")
            if error:
                raise error
            run.finish()
    except (ValueError, KeyboardInterrupt):
        pass
    change_state(tmp_path / "run", **state)
    before = tree(tmp_path / "run")
    main_status(["watch", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert message in text and "train epoch 2/4" in text and "train: failed: no  [31mluck" in text
    assert drawn == [2] and tree(tmp_path / "run") == before


def test_process_on_another_host_is_assumed_to_run(tmp_path):
    with started(tmp_path / "run", "train", epochs=1):
        change_state(tmp_path / "run", pid=ended_process(), host="elsewhere")
        assert "process" in (text := shown(tmp_path / "run")) and "on elsewhere" in text and " left" in text
        change_state(tmp_path / "run", host=socket.gethostname())
        assert read_snapshot(tmp_path / "run").status == "killed"


def test_half_written_and_damaged_lines(tmp_path):
    with started(tmp_path / "run", "train", epochs=2) as run:
        written = (run.path / "metrics.jsonl").read_bytes()
        for half in (b'{"stage": "tr', json.dumps(line("train", 3)).encode()):
            (run.path / "metrics.jsonl").write_bytes(written + half)
            assert len(read_snapshot(run.path).lines) == 2 and "damaged" not in shown(run.path)
        bad = [
            line("train", 3, loss=None),
            line("nowhere", 3),
            {**line("train", 1), "epoch": "x"},
            line("train", 3, metrics=[1]),
            line("train", 3, metrics={"mae": "x"}),
            [],
            7,
        ]
        bad += [line(["train"], 3), line("train", 3, seconds="long")]
        text = b"".join(json.dumps(one).encode() + b"\n" for one in bad) + b"\xff\n{\n"
        (run.path / "metrics.jsonl").write_bytes(text + written)
        assert len(read_snapshot(run.path).lines) == 2 and f"{len(bad) + 2} damaged lines skipped" in shown(
            read_snapshot(run.path)
        )
        (run.path / "recipe.yaml").write_bytes(b"\xff: [")
        (run.path / "run.log").write_bytes(b"\xff\xfe")
        assert "train epoch 2\n" in shown(run.path), "the number of epochs is unknown without a recipe"


def test_figures_are_drawn_for_new_epochs_and_not_too_often(tmp_path, drawn, monkeypatch):
    now = {"now": 0.0}
    monkeypatch.setattr(watching.time, "monotonic", lambda: now["now"])
    took = lambda run: now.update(now=now["now"] + 3) or drawn.append(len(run.metrics)) or ()  # noqa: E731
    with started(tmp_path / "run", "train") as run:
        monkeypatch.setattr("prunekit.reporting.figures.training_figures", took)
        figures = FigureWriter(run.path)
        assert figures.update(read_snapshot(run.path)) == "no figures: no epoch has finished"
        run.append_metrics(line("train", 1))
        figures.update(read_snapshot(run.path))
        figures.update(read_snapshot(run.path))
        assert drawn == [1]
        run.append_metrics(line("train", 2))
        figures.update(read_snapshot(run.path))
        assert drawn == [1], "after three seconds of drawing, at least twelve without"
        now["now"] += 12.5
        figures.update(read_snapshot(run.path))
        assert drawn == [1, 2]
        run.append_metrics(line("train", 3))
        figures.update(replace(read_snapshot(run.path), status="killed"))
        assert drawn == [1, 2, 3], "the final figures are drawn at once"


def test_run_is_shown_if_figures_cannot_be_written(tmp_path, capsys):
    with started(tmp_path / "run", "train", epochs=2) as run:
        (run.path / "report").write_text("in the way")
        main_status(["watch", str(run.path), "--once"])
    text = capsys.readouterr().out
    assert "train epoch 3/4" in text and "no figures: cannot write" in text


def test_figures_of_a_running_run(tmp_path, capsys):
    with started(tmp_path / "run", "train", epochs=3) as run:
        before = tree(run.path)
        main_status(["watch", str(run.path), "--once"])
        after = tree(run.path)
        run.append_metrics(line("train", 4))  # It still holds its lock.
    assert f"figures in {run.path / 'report'}: training" in capsys.readouterr().out
    assert {p: data for p, data in after.items() if p.parts[0] != "report"} == before
    assert {p.name for p in after if p.parts[0] == "report"} >= {"training.png", "training.svg"}


def main_status(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf"])
def test_invalid_interval(tmp_path, every):
    with started(tmp_path / "run"), pytest.raises(PrunekitError, match=r"--every .*such as 5"):
        watch(tmp_path / "run", Console(quiet=True), every=float(every))


def test_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["watch", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_run_that_is_being_replaced_is_read_again(tmp_path, monkeypatch):
    results = [RunFolderError("being replaced"), "the new one"]
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)

    def next_result(_):
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(watching, "read_snapshot", next_result)
    assert watching._next_snapshot(tmp_path, 1.0) == "the new one"
    results[:] = [RunFolderError("being replaced"), RunFolderError("removed")]
    with pytest.raises(RunFolderError, match="removed"):
        watching._next_snapshot(tmp_path, 1.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_stops_watching_without_an_error(tmp_path, terminal, drawn, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupt)
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with started(tmp_path / "run", "train", epochs=2) as run:
        watch(run.path, console)
    text = console.file.getvalue()
    assert "train epoch 3/4" in text or "epoch 3/4" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == int(terminal)


def test_import_needs_no_torch():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'pandas', 'matplotlib', 'accelerate'))); "
        "import prunekit.commands.watch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_run_in_another_process_is_watched_to_its_end(tmp_path, drawn):
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    seen = tmp_path / "seen"

    class Screen(io.StringIO):
        def write(self, text):
            if "running" in text:
                seen.touch()  # the writer waits for it before it ends
            return super().write(text)

    command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), str(seen)]
    writer = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    console = Console(file=Screen(), width=80)
    watch(tmp_path / "run", console, every=0.02)
    assert writer.wait() == 0
    text = console.file.getvalue()
    assert "running" in text and text.rpartition("run  ")[2].startswith("complete")
    assert text.rpartition("run  ")[2].count("epoch 4/4") == 1 and drawn[-1] == 6


def test_killed_run(tmp_path, drawn):
    overrides = "backbone.options={depth: 8, width: 4}|train.epochs=500|train.batch_size=256|finetune.epochs=1"
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prunekit.cli", "run", "digits_resnet", *overrides.split("|"), "--out", str(run)]
    training = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        while training.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        assert read_snapshot(run).status == "running" and read_snapshot(run).epochs == {"train": 500, "finetune": 1}
        training.send_signal(signal.SIGKILL)
        training.wait()
        console = Console(file=io.StringIO(), width=80)
        watch(run, console, every=0.1)
    finally:
        training.kill()
        training.wait()
    assert f"killed in train  process {training.pid} no longer exists" in console.file.getvalue() and drawn
