"""Training checkpoints: retention and damage."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from prunekit.errors import CheckpointError
from prunekit.runs.run_dir import RunDir

RECIPE = "name: tiny\nseed: 0\ntrain:\n  lr: 1e-3\n"


@pytest.fixture
def run(tmp_path):
    with RunDir.start(tmp_path / "run", RECIPE, {"threads": 1}) as made:
        yield made


def failing(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_newest_checkpoints_are_kept(run):
    for epoch in range(1, 6):
        run.save_checkpoint("train", epoch, {"v": np.full(2, epoch)}, {"epoch": epoch}, keep=2)
    run.save_checkpoint("finetune", 1, {}, {}, keep=1)
    (run.path / "checkpoints" / "train-0009.safetensors").write_bytes(b"left by a kill")
    run.save_checkpoint("train", 6, {"v": np.full(2, 6)}, {"epoch": 6}, keep=2)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
        "finetune-0001.json",
        "finetune-0001.safetensors",
        *(f"train-{epoch:04d}.{kind}" for epoch in (5, 6) for kind in ("json", "safetensors")),
    ]
    assert run.latest_checkpoint("train") == 6


def test_best_checkpoint_is_kept(run):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        run.save_checkpoint("train", step, {"v": np.full(2, step)}, {"epoch": step}, keep=1, best=best)
        kept = sorted({best, step})
        assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
            f"train-{one:04d}.{kind}" for one in kept for kind in ("json", "safetensors")
        ]


@pytest.mark.parametrize("name", ["train-0002.safetensors", "train-0002.json"])
@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-9]), "flip"])
def test_damaged_checkpoint_is_skipped_with_warning(run, caplog, name, harm):
    for epoch in (1, 2):
        run.save_checkpoint("train", epoch, {"v": np.full(2, epoch)}, {"epoch": epoch, "loss": 0.1 * epoch}, keep=2)
    path = run.path / "checkpoints" / name
    if harm == "flip":
        path.write_bytes(path.read_bytes().replace(b'epoch": 2', b'epoch": 3').replace(b"\x02", b"\x03"))
    else:
        harm(path)
    tensors, state = run.load_checkpoint("train")
    assert state == {"epoch": 1, "loss": 0.1} and tensors["v"].tolist() == [1, 1]
    assert run.latest_checkpoint("train") == 1
    assert "train-0002" in caplog.text or not path.exists()


def test_training_that_resumed_before_a_damaged_checkpoint_keeps_its_own(run):
    for epoch in (1, 5):
        run.save_checkpoint("train", epoch, {"v": np.full(2, epoch)}, {"epoch": epoch}, keep=2)
    (run.path / "checkpoints" / "train-0005.safetensors").write_bytes(b"damaged")
    for epoch in (2, 3):
        run.save_checkpoint("train", epoch, {"v": np.full(2, epoch)}, {"epoch": epoch}, keep=1)
        assert run.latest_checkpoint("train") == epoch
        assert len(list((run.path / "checkpoints").iterdir())) == 2


def test_no_checkpoint(run):
    assert run.load_checkpoint("train") is None and run.latest_checkpoint("train") is None


def test_failed_rewrite_keeps_previous_checkpoint(run, monkeypatch):
    for epoch in (1, 2):
        run.save_checkpoint("train", epoch, {"v": np.full(3, epoch)}, {}, 2)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError):
        run.save_checkpoint("train", 2, {"v": np.full(3, 9)}, {}, 2)
    assert run.load_checkpoint("train")[0]["v"][0] == 1
