"""Runs of two processes on one machine."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import rank
from safetensors.torch import load_file
from torch import nn

from prunekit.config.recipe import load
from prunekit.errors import CheckpointError, RecipeError, TrainingError
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.preflight import check_recipe
from prunekit.runs.run_dir import RunDir
from prunekit.training import acceleration
from prunekit.utils import distributed

TESTS = Path(__file__).parents[1]
SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))
# The report takes longest.
WITHOUT_FIGURES = """
from prunekit import cli, reporting
reporting.report = lambda *_: None
cli.main()
"""
TOY = [
    "digits_resnet",
    "train.gradual_pruning.start=null",
    "backbone.options={depth: 8, width: 4}",
    "train.epochs=2",
    "train.batch_size=100",
    "train.gate_lr=0.1",
    "target.params_ratio=0.5",
    "slim.steps=2",
    "finetune.epochs=1",
    "finetune.batch_size=100",
    "export.onnx=false",
]


def start(*command, count=2):
    """Start processes of one command as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    python = f"{TESTS.parent}{os.pathsep}{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, **shared, "PYTHONPATH": python, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def ended(started, seconds=600):
    """Wait for processes; return the output and exit status of each."""
    try:
        said = [one.communicate(timeout=seconds) for one in started]
    finally:
        for one in started:
            one.kill()
    return [(out, err, one.returncode) for (out, err), one in zip(said, started, strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of two processes, and their output and exit status."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, ended(start(TESTS / "helpers" / "rank.py", folder))


@pytest.mark.parametrize("name", rank.RUNS)
def test_two_processes_equal_one_that_accumulates_two_batches(pair, tmp_path, name):
    with RunDir.start(tmp_path / "run", "name: test\n", {}) as run:
        alone, _ = rank.train(run, accumulate=2, **rank.RUNS[name])
    pair, said = pair
    assert (pair / f"{name}-1.safetensors").exists(), said
    first, second = (load_file(pair / f"{name}-{number}.safetensors") for number in range(2))
    before = rank.Small().state_dict()
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        assert (first[key] - value).abs().max() <= 1e-5, key
        assert not value.is_floating_point() or key == "constant" or not torch.equal(value, before[key]), key
    if name in ("gradual", "progressive"):
        assert first["bn2.weight"].nonzero().flatten().tolist() == [1, 2, 3, 4, 5] and not first["bn2.bias"][0]
    lines = [RunDir.open(folder).read_metrics() for folder in (pair / name, tmp_path / "run")]
    assert len(lines[0]) == rank.RUNS[name]["epochs"]
    for one, other in zip(*lines, strict=True):
        assert one["step"] == other["step"] and one["alive"] == other["alive"]
        for key in ("loss", "penalty"):
            assert one[key] == pytest.approx(other[key], abs=1e-5)


def test_resume_with_another_number_of_processes(pair, tmp_path, monkeypatch):
    with RunDir.start(pair[0] / "many", "name: test\n", {}, resume=True) as run:
        _, said = rank.train(run, epochs=4)
        assert said == ["train: started with 2 batches a step; accumulating 2 in each process"]
        assert [line["step"] for line in run.read_metrics()] == [3, 6, 9, 12]
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        with pytest.raises(
            CheckpointError, match="2 batches a step, which 3 processes cannot share evenly; resume with 1 or 2,"
        ):
            rank.train(run, epochs=5)


def test_more_batches_than_images(tmp_path):
    few = pytest.raises(TrainingError, match="24 images are too few for the 25 batches of a step")
    with RunDir.start(tmp_path / "run", "name: test\n", {}) as run, few:
        rank.train(run, epochs=1, accumulate=25)


def test_death_of_a_process_ends_the_run_with_one_line(pair):
    folder, ((out, _, status), (_, _, killed)) = pair
    assert (status, killed) == (3, -signal.SIGKILL)
    assert out.startswith("another of the 2 processes of this run has ended or cannot be reached (")
    assert out.endswith("; continue with --resume\n") and out.count("\n") == 1
    run = RunDir.open(folder / "death")
    assert run.status == "failed" and run.latest_checkpoint("train") is not None


def run_by_two(out, *more):
    return start("-c", WITHOUT_FIGURES, "run", *TOY, "--out", out, *more)


def test_complete_run_of_two_processes(tmp_path):
    out = tmp_path / "toy"
    (text, err, status), (other, silence, second) = ended(run_by_two(out))
    assert (status, second) == (0, 0), err + silence
    assert "train: done in" in text and "finetuned" in text and not other and "prunekit" not in silence
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["equivalence"]["passed"]
    assert summary["kept"]["params_ratio"] == pytest.approx(0.5, abs=0.02)
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    lines = [(line["stage"], line["epoch"]) for line in RunDir.open(out).read_metrics()]
    assert lines == [("train", 1), ("train", 2), ("step1", 1), ("finetune", 1)]


def has_joined(out, first):
    """Whether the first process works on the run, which it does when all have joined."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((out / "state.json").read_text())["pid"] == first.pid
    return False


@pytest.mark.skipif(not SOAK, reason="make soak")
def test_runs_with_killed_processes_end_with_the_same_weights(tmp_path):
    """Kill a random process at random times until the run completes."""
    chance, took = random.Random(0), []
    ended(run_by_two(tmp_path / "whole"))
    for trial in range(3 * SOAK):
        out, said = tmp_path / f"broken-{trial}", []
        while {status for *_, status in said} != {0}:
            started = run_by_two(out, "--resume")
            victim = started[chance.randrange(2)]
            # One that has not joined is waited for until a timeout; torchrun would end both.
            while started[0].poll() is None and not has_joined(out, started[0]):
                time.sleep(0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                victim.wait(chance.uniform(0, 60))
            victim.kill()
            began = time.monotonic()
            said = ended(started, seconds=60)
            if victim.returncode == -signal.SIGKILL:
                took.append(time.monotonic() - began)
                other = said[started.index(victim) - 1]
                # Process 0 may no longer need the others and completes alone.
                assert other[2] == 3 or (victim is started[1] and other[2] == 0), said
                assert other[1].count("; continue with --resume") == (other[2] == 3), said
        for name in ("dense", "finetuned"):
            files = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("whole", out.name)]
            assert files[0] == files[1], (trial, name)
    print(
        f"{len(took)} processes killed; the others ended within {max(took):.1f} s; all runs ended with the same weights"
    )


def test_sync_norms_use_sync_batch_norm_and_need_a_gpu(monkeypatch):
    message = r"train\.sync_norms: synchronized norms .* need GPUs, and this run is on the CPU; set .*sync_norms=false$"
    with pytest.raises(RecipeError, match=message):
        check_recipe(RunContext(load("digits_resnet", ["train.sync_norms=true"]), rank.Silent()), load_data=False)
    model, seen = rank.Small(), []

    def forward(norm, x):
        seen.append(norm)
        return nn.BatchNorm2d.forward(norm, x)

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    with acceleration.sync_batch_norms(model):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        model.eval()
        model(torch.randn(2, 3, 8, 8))
    assert [norm.weight is mine.weight for norm, mine in zip(seen, (model.bn1, model.bn2), strict=True)] == [True, True]
    assert model.bn1.num_batches_tracked == 1 and model.bn1.weight.grad is not None
    assert "forward" not in vars(model.bn1) and type(model.bn1) is nn.BatchNorm2d
