"""A run is watched from another process: it is only read, whatever state it is in."""

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
from prunekit.commands.watch import Drawer, look, watch
from prunekit.errors import PrunekitError, RunFolderError
from prunekit.runs.run_dir import RunDir

RECIPE = "name: toy\ntrain:\n  epochs: 4\nfinetune:\n  epochs: 2\nslim:\n  steps: 2\n  threshold: 0.1\n"
WRITER = """
import sys, time
from prunekit.runs.run_dir import RunDir
from prunekit.stageorder import STAGES
from test_watching import RECIPE, line
with RunDir.start(sys.argv[1], RECIPE, {}) as run:
    print("begun", flush=True)
    for stage in STAGES:
        run.begin(stage)
        for epoch in {"train": (1, 2, 3, 4), "finetune": (1, 2)}.get(stage, ()):
            run.append_metrics(line(stage, epoch))
            time.sleep(0.05)
        run.end(stage)
"""


def line(stage, epoch, **more):
    figures = {"loss": 2 / epoch, "penalty": 3.0, "lambda": 5.0, "lr": 0.1, "alive": 9 - epoch, "of": 9}
    return {"stage": stage, "epoch": epoch, "step": epoch, **figures, "metrics": {"mae": 0.1}, "seconds": 10.0, **more}


def begun(path, *stages, epochs=0):
    """The folder of a run that has come so far, and goes on in this process."""
    run = RunDir.start(path, RECIPE, {})
    for stage in stages:
        run.begin(stage)
    for epoch in range(1, epochs + 1):
        run.append_metrics(line("train", epoch))
    return run


def shown(glance, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(glance)
    return console.file.getvalue()


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def tree(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def drawn(monkeypatch):
    """How often figures were drawn; none is."""
    calls = []
    monkeypatch.setattr("prunekit.reporting.figures.training_figures", lambda run: calls.append(len(run.metrics)) or ())
    return calls


# ---- what is seen


def test_a_run_before_its_first_epoch(tmp_path):
    with begun(tmp_path / "run") as run:
        assert "run  running" in shown(look(run.path)) and "no epoch is done yet" in shown(look(run.path))
        run.begin("train")
        text = shown(look(run.path))
        assert f"run  running  stage train, 1 of 7  process {os.getpid()}\n" in text and "train epoch 1/4" in text


def test_a_training_under_way(tmp_path):
    with begun(tmp_path / "run", "train", epochs=2) as run:
        os.utime(run.path / "metrics.jsonl", (time.time() - 4, time.time() - 4))
        glance = look(run.path)
        (figures,) = glance.trainings()
        # 20 s for the two epochs left but for the 4 s since; then two trainings of two epochs.
        assert figures.left == pytest.approx(16, abs=1) and figures.run_left == pytest.approx(56, abs=1)
        assert (figures.epoch, figures.epochs, figures.share) == (3, 4, 0.5)
        text = shown(replace(glance, age=4.0))
        assert "train epoch 3/4 ━" in text and " 0:16 left\n" in text and "run ~0:56 left" in text
        assert "loss 1.000 █▁  penalty 3  λ 5  alive 7/9  mae 0.100 ▁▁" in text and "last epoch 0:04 ago" in text


def test_a_training_within_another_stage_and_after_others(tmp_path):
    with begun(tmp_path / "run", "train", "slim", epochs=4) as run:
        assert [figures.left for figures in look(run.path).trainings()] == [None]
        run.append_metrics(line("step1", 1, size={"params": 1_200}, budget={"params": 1_000}))
        first, second = look(run.path).trainings()
        assert first.left is None and second.left > 0 and second.run_left > second.left
        text = shown(look(run.path))
        assert "train epoch 4/4  loss 0.500" in text and "step1 epoch 2/2 ━" in text and "params 1.2k/1k" in text
        run.begin("finetune")
        assert [figures.stage for figures in look(run.path).trainings()] == ["train", "step1", "finetune"]
        assert [figures.left for figures in look(run.path).trainings()] == [None] * 3


@pytest.mark.parametrize("width", [80, 40, 20])
def test_nothing_is_wider_than_the_terminal(tmp_path, width):
    path = tmp_path / ("a_long_name_" * 5)
    with begun(path, "train", epochs=2) as run:
        text = shown(look(path), width)
        run.log = (path / "run.log").write_text("2026-01-01 00:00:00  " + "word " * 50)
        run.begin("slim")
        assert max(map(len, (text + shown(look(path), width)).splitlines())) <= width


@pytest.mark.parametrize(
    ("left", "state", "said"),
    [
        (None, {}, "complete\n"),
        (ValueError, {}, "failed in train\n"),
        (KeyboardInterrupt, {}, "interrupted in train  go on with --resume\n"),
        (KeyboardInterrupt, {"status": "running", "pid": gone()}, "is gone  go on with --resume\n"),
        (KeyboardInterrupt, {"status": "odd"}, "no state that can be read\n"),
    ],
)
def test_a_run_that_is_over_is_shown_once(tmp_path, left, state, said, drawn, capsys):
    try:
        with begun(tmp_path / "run", "train", epochs=2) as run:
            (run.path / "run.log").write_text("2026-01-01 00:00:00  train: failed: no \x1b[31mluck\n")
            if left:
                raise left
            run.finish()
    except (ValueError, KeyboardInterrupt):
        pass
    change_state(tmp_path / "run", **state)
    before = tree(tmp_path / "run")
    main_status(["watch", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert said in text and "train epoch 2/4" in text and "train: failed: no  [31mluck" in text
    assert drawn == [2] and tree(tmp_path / "run") == before


def test_a_run_on_another_host_is_taken_at_its_word(tmp_path):
    with begun(tmp_path / "run", "train", epochs=1):
        change_state(tmp_path / "run", pid=gone(), host="elsewhere")
        assert "process" in (text := shown(look(tmp_path / "run"))) and "on elsewhere" in text and " left" in text
        change_state(tmp_path / "run", host=socket.gethostname())
        assert look(tmp_path / "run").status == "killed"


def test_half_and_damaged_lines(tmp_path):
    with begun(tmp_path / "run", "train", epochs=2) as run:
        held = (run.path / "metrics.jsonl").read_bytes()
        for half in (b'{"stage": "tr', json.dumps(line("train", 3)).encode()):
            (run.path / "metrics.jsonl").write_bytes(held + half)
            assert len(look(run.path).lines) == 2 and "damaged" not in shown(look(run.path))
        bad = [
            line("train", 3, loss=None),
            line("nowhere", 3),
            {**line("train", 1), "epoch": "x"},
            line("train", 3, metrics=[1]),
            [],
            7,
        ]
        bad += [line("train", 3, size={"params": "x"}), line(["train"], 3), line("train", 3, seconds="long")]
        text = b"".join(json.dumps(one).encode() + b"\n" for one in bad) + b"\xff\n{\n"
        (run.path / "metrics.jsonl").write_bytes(text + held)
        assert len(look(run.path).lines) == 2 and f"{len(bad) + 2} damaged lines left out" in shown(look(run.path))
        (run.path / "recipe.yaml").write_bytes(b"\xff: [")
        (run.path / "run.log").write_bytes(b"\xff\xfe")
        assert "train epoch 2\n" in shown(look(run.path)), "without a recipe nobody says of how many"


# ---- what is drawn


def test_figures_are_drawn_where_there_is_something_new(tmp_path, drawn, monkeypatch):
    now = {"now": 0.0}
    monkeypatch.setattr(watching.time, "monotonic", lambda: now["now"])
    took = lambda run: now.update(now=now["now"] + 3) or drawn.append(len(run.metrics)) or ()  # noqa: E731
    with begun(tmp_path / "run", "train") as run:
        monkeypatch.setattr("prunekit.reporting.figures.training_figures", took)
        drawer = Drawer(run.path)
        assert drawer.draw(look(run.path)) == "no figures: no epoch is done"
        run.append_metrics(line("train", 1))
        drawer.draw(look(run.path))
        drawer.draw(look(run.path))
        assert drawn == [1]
        run.append_metrics(line("train", 2))
        drawer.draw(look(run.path))
        assert drawn == [1], "three seconds of figures are followed by twelve without"
        now["now"] += 12.5
        drawer.draw(look(run.path))
        assert drawn == [1, 2]
        run.append_metrics(line("train", 3))
        drawer.draw(replace(look(run.path), status="killed"))
        assert drawn == [1, 2, 3], "the last are drawn at once"


def test_a_folder_that_takes_no_figures_is_shown_all_the_same(tmp_path, capsys):
    with begun(tmp_path / "run", "train", epochs=2) as run:
        (run.path / "report").write_text("in the way")
        main_status(["watch", str(run.path), "--once"])
    text = capsys.readouterr().out
    assert "train epoch 3/4" in text and "no figures: cannot write" in text


def test_the_figures_of_a_run_that_goes_on(tmp_path, capsys):
    with begun(tmp_path / "run", "train", epochs=3) as run:
        before = tree(run.path)
        main_status(["watch", str(run.path), "--once"])
        after = tree(run.path)
        run.append_metrics(line("train", 4))  # It still has its lock.
    assert f"figures in {run.path / 'report'}: training" in capsys.readouterr().out
    assert {p: data for p, data in after.items() if p.parts[0] != "report"} == before
    assert {p.name for p in after if p.parts[0] == "report"} >= {"training.png", "training.svg"}


# ---- the command


def main_status(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf"])
def test_what_is_no_time_is_refused(tmp_path, every):
    with begun(tmp_path / "run"), pytest.raises(PrunekitError, match=r"--every .*such as 5"):
        watch(tmp_path / "run", Console(quiet=True), every=float(every))


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["watch", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_that_is_replaced_is_waited_for(tmp_path, monkeypatch):
    found = [RunFolderError("gone for a moment"), "the new one"]
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)

    def next_look(_):
        one = found.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    monkeypatch.setattr(watching, "look", next_look)
    assert watching._next(tmp_path, 1.0) == "the new one"
    found[:] = [RunFolderError("gone"), RunFolderError("for good")]
    with pytest.raises(RunFolderError, match="for good"):
        watching._next(tmp_path, 1.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_stopping_to_watch_is_no_mistake(tmp_path, terminal, drawn, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupt)
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    with begun(tmp_path / "run", "train", epochs=2) as run:
        watch(run.path, console)
    text = console.file.getvalue()
    assert "train epoch 3/4" in text or "epoch 3/4" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == int(terminal)


def test_it_needs_no_torch_and_starts_fast():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'pandas', 'matplotlib', 'accelerate'))); "
        "import prunekit.commands.watch"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_in_another_process_is_watched_to_its_end(tmp_path, drawn):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "run")], env=env, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "begun\n"
    console = Console(file=io.StringIO(), width=80)
    watch(tmp_path / "run", console, every=0.02)
    assert writer.wait() == 0
    text = console.file.getvalue()
    assert "running" in text and text.rpartition("run  ")[2].startswith("complete")
    assert text.rpartition("run  ")[2].count("epoch 4/4") == 1 and drawn[-1] == 6


def test_a_real_run_that_is_killed(tmp_path, drawn):
    overrides = "backbone.options={depth: 8, width: 4}|train.epochs=500|train.batch_size=256|finetune.epochs=1"
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prunekit.cli", "run", "digits_resnet", *overrides.split("|"), "--out", str(run)]
    training = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        while training.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        assert look(run).status == "running" and look(run).epochs == {"train": 500, "finetune": 1}
        training.send_signal(signal.SIGKILL)
        training.wait()
        console = Console(file=io.StringIO(), width=80)
        watch(run, console, every=0.1)
    finally:
        training.kill()
        training.wait()
    assert f"killed in train  process {training.pid} is gone" in console.file.getvalue() and drawn
