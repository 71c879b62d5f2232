"""A run killed at any moment resumes to the same result as an uninterrupted one.

With PRUNEKIT_SOAK=N in the environment: killed at every write of a run, and N × 30 times at random moments.
"""

import json
import os
import random
import shlex
import signal

import numpy as np
import pytest
from helpers.killing import Launcher
from helpers.small_run import BY_THRESHOLD

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))
TOY = [
    "digits_resnet",
    *BY_THRESHOLD,
    "backbone.options={depth: 8, width: 4}",
    "data.size=16",
    "train.epochs=2",
    "train.batch_size=256",
    "train.gate_lr=0.1",
    "train.checkpoint={steps: 3}",
    "decay={name: l1, weight: 1e-2}",
    "slim.threshold=0.6",
    "slim.recalibrate=1",
    "finetune.epochs=1",
    "finetune.batch_size=512",
    "export.onnx=false",
]
# All that a training can carry along, and rounds of cuts with trainings in between.
ROUNDS = [
    *TOY,
    "train.epochs=4",
    "decay={name: dynamic, weight: 20, options: {branch_weights: flops}}",
    "slim.steps=2",
    "slim.recalibrate=0",
    "target.params_ratio=0.3",
]
EXPORTING = [*TOY, "export.onnx=true"]
# What says when and where, and what is checked apart.
ASIDE = {"environment.json", "state.json", "run.log", "metrics.jsonl", "summary.json", "model.onnx"}


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def whole(launcher, tmp_path_factory):
    """Return a function from a recipe to the folder and the calls of its uninterrupted run."""
    made = {}

    def make(recipe):
        key = tuple(recipe)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            answer = launcher.run("run", *recipe, "--out", folder)
            assert answer["status"] == 0, answer["err"]
            made[key] = folder, answer["calls"]
        return made[key]

    return make


def timeless(value):
    """Remove times, and the export, whose form is chosen by timing."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "export")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    """Return the content of a run folder that must be reproducible."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    kept = {
        n: p.read_bytes()
        for n, p in files.items()
        if n not in ASIDE and n.split("/")[0] not in ("checkpoints", "report")
    }
    kept["summary"] = timeless(json.loads((folder / "summary.json").read_text()))
    kept["metrics"] = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return kept


def same(folder, other):
    ours, theirs = contents(folder), contents(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    if (other / "model.onnx").exists():
        images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
        assert np.allclose(outputs(folder, images), outputs(other, images), atol=1e-5)


def outputs(folder, images):
    import onnxruntime

    session = onnxruntime.InferenceSession((folder / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def killed_and_resumed(launcher, recipe, folder, *kills):
    """Kill a run in each of these ways in turn, then resume it; return whether all kills came before its end."""
    died = [launcher.run("run", *recipe, "--out", folder, "--resume", **kill)["status"] == -9 for kill in kills]
    answer = launcher.run("run", *recipe, "--out", folder, "--resume")
    assert answer["status"] == 0, answer["err"]
    return all(died)


def first(calls, call, behind="", last=False):
    """Return the number, from 1, of the first such call after another one."""
    start = next(i for i, name in enumerate(calls) if behind in name)
    found = [i for i, name in enumerate(calls) if i >= start and call in name]
    return found[-1 if last else 0] + 1


MOMENTS = {
    "before the run exists": ("replace run/state.json", ""),
    "half a checkpoint": ("fsync checkpoints/.tmp-", "fsync run/metrics.jsonl"),
    "checkpoint without its JSON": ("replace checkpoints/train-0006.json", ""),
    "between extract and slim": ("fsync run/.tmp-", "replace extract/plan.json"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_at_chosen_write_then_resume_gives_same_result(launcher, whole, tmp_path, moment):
    folder, calls = whole(TOY)
    number = first(calls, *MOMENTS[moment])
    assert killed_and_resumed(launcher, TOY, tmp_path / "run", {"call": number})
    same(tmp_path / "run", folder)
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".tmp-") or p.name == "lock"]


@pytest.mark.slow
def test_repeated_kills_in_training_steps_then_resume(launcher, whole, tmp_path):
    folder, _ = whole(ROUNDS)
    # In the middle of the second epoch, and of the fourth.
    assert killed_and_resumed(launcher, ROUNDS, tmp_path / "run", {"step": 8}, {"step": 13})
    same(tmp_path / "run", folder)


@pytest.mark.skipif(not SOAK, reason="takes half an hour; PRUNEKIT_SOAK=1 runs it")
@pytest.mark.parametrize("recipe", [TOY, ROUNDS], ids=["toy", "rounds"])
def test_kill_at_every_write(launcher, whole, tmp_path, capsys, recipe):
    folder, _ = whole(recipe)
    # The first run on a machine also fills caches outside its folder.
    calls = launcher.run("run", *recipe, "--out", tmp_path / "counted")["calls"]
    wrong = []
    for number, call in enumerate(calls, 1):
        if call.startswith("fsync") and not call.endswith(".jsonl") and "/.tmp-" not in call:
            continue  # fsync of a folder: the files are the same until the next call
        out = tmp_path / f"{number}" / "run"
        try:
            assert killed_and_resumed(launcher, recipe, out, {"call": number})
            same(out, folder)
        except (AssertionError, OSError) as error:
            print(number, call, error)
            wrong.append((number, call))
    with capsys.disabled():
        print(f"\nkilled at all of {len(calls)} writes: {len(wrong)} ended otherwise")
    assert wrong == []


@pytest.mark.skipif(not SOAK, reason="takes some minutes; PRUNEKIT_SOAK=1 runs it")
@pytest.mark.parametrize("recipe", [EXPORTING, ROUNDS], ids=["exporting", "rounds"])
def test_kill_at_random_times(launcher, whole, tmp_path, capsys, recipe):
    folder, _ = whole(recipe)
    seconds = json.loads((folder / "summary.json").read_text())["seconds"]
    drawn, came, wrong = random.Random(0), 0, []
    for number in range(15 * SOAK):
        out = tmp_path / f"{number}" / "run"
        kills = [{"seconds": drawn.uniform(0, sum(seconds.values()))} for _ in range(1 + number % 3)]
        came += killed_and_resumed(launcher, recipe, out, *kills)
        try:
            same(out, folder)
        except (AssertionError, OSError) as error:
            wrong.append((kills, str(error)))
    with capsys.disabled():
        print(f"\nkilled at {15 * SOAK} random moments, {came} of them in time: {len(wrong)} ended otherwise")
    assert wrong == []


def test_interrupted_run_prints_resume_command(launcher, whole, tmp_path):
    folder, _ = whole(TOY)
    out = tmp_path / "two words" / "run"
    answer = launcher.run("run", *TOY, "--out", out, at=8, signals=[signal.SIGINT])
    assert answer["status"] == 130 and "Traceback" not in answer["err"]
    assert "stopping after this step" in answer["err"]
    assert "stopped after step 3 of epoch 2; checkpoint saved" in answer["out"]
    assert (out / "checkpoints" / "train-0008.json").is_file()
    assert json.loads((out / "state.json").read_text())["status"] == "interrupted"
    said = answer["err"].splitlines()[-1]
    assert said.startswith("prunekit: interrupted; resume with: prunekit run digits_resnet ")
    assert launcher.run(*shlex.split(said.partition("resume with: prunekit ")[2]))["status"] == 0
    same(out, folder)


def test_interrupted_finetune_prints_resume_command(launcher, whole, tmp_path):
    folder, _ = whole(TOY)
    answer = launcher.run("finetune", folder, "--out", tmp_path / "run", at=1, signals=[signal.SIGINT])
    assert answer["status"] == 130
    said = answer["err"].splitlines()[-1].partition("resume with: prunekit ")[2]
    assert launcher.run(*shlex.split(said))["status"] == 0
    name = "finetuned/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_derived_run_killed_while_copying_is_not_resumed(launcher, whole, tmp_path):
    folder, _ = whole(TOY)
    out = tmp_path / "run"
    command = ["finetune", folder, "finetune.epochs=0", "--out"]
    number = first(launcher.run(*command, tmp_path / "whole")["calls"], "replace dense/model.safetensors")
    assert launcher.run(*command, out, call=number)["status"] == -9
    answer = launcher.run("run", out / "recipe.yaml", "--out", out, "--resume")
    assert answer["status"] == 2 and "that made it, with --overwrite" in answer["err"]


def test_second_signal_stops_at_once(launcher, tmp_path):
    answer = launcher.run("run", *TOY, "--out", tmp_path / "run", at=8, signals=[signal.SIGTERM, signal.SIGTERM])
    assert answer["status"] == 130 and answer["err"].endswith("--resume\n")
    assert "its state is saved" not in answer["out"]
    assert not (tmp_path / "run" / "checkpoints" / "train-0008.json").is_file()


def test_signal_outside_training_stops_at_once(launcher, tmp_path):
    command = ["run", *TOY, "train.epochs=0", "--out", str(tmp_path / "run")]
    answer = launcher.run(*command, raises=["slim", "KeyboardInterrupt", ""])
    assert answer["status"] == 130
    assert answer["err"] == f"prunekit: interrupted; resume with: prunekit {shlex.join(command)} --resume\n"


@pytest.mark.parametrize(
    "kind, text, words",
    [
        (
            "RuntimeError",
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to\nallocate 1 byte",
            "smaller batch_size",
        ),
        ("OSError", "the disk has gone", "continue with --resume"),
    ],
)
def test_unexpected_error_is_one_line_with_traceback_in_log(launcher, tmp_path, kind, text, words):
    out = tmp_path / "run"
    quick = [*TOY, "train.epochs=0", "--out", out]
    answer = launcher.run("run", *quick, raises=["slim", kind, text])
    assert answer["status"] == 3
    (line,) = answer["err"].splitlines()
    assert line.startswith(f"prunekit: slim: {kind}: ") and words in line and str(out / "run.log") in line
    assert json.loads((out / "state.json").read_text())["status"] == "failed"
    log = (out / "run.log").read_text().splitlines()
    assert any(entry.endswith("  Traceback (most recent call last):") for entry in log)
    assert any(f"  {kind}: " in entry for entry in log[-2:])
    assert all(entry[:4].isdecimal() and entry[4] == "-" for entry in log)
    answer = launcher.run("run", *quick, "--resume", "--debug", raises=["slim", kind, text])
    assert answer["status"] == 3 and "Traceback" in answer["err"]
