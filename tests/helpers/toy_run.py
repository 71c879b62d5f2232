"""Complete runs that take a second or two: sixteen images of two classes, distinguished by brightness."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from helpers.small_run import BY_THRESHOLD, NoRecord, skip_figures, skip_rehearsal
from prunekit.config.recipe import load
from prunekit.config.schema import Recipe
from prunekit.reporting import load_run
from prunekit.runs.run_dir import RunDir
from prunekit.utils.io import TEMP_PREFIX


def quiet() -> Console:
    return Console(quiet=True)


def write_photos(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 250)):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            picture = Image.fromarray(random.integers(level - 60, level, (8, 8, 3), np.uint8))
            picture.save(folder / name / f"{name}{number}.png")
    return folder


def toy_recipe(photos: Path, *overrides: str) -> Recipe:
    return load(
        "digits_resnet",
        [
            *BY_THRESHOLD,
            "backbone.options={depth: 8, width: 4, classes: 2}",
            f"data={{name: image_folder, root: {photos}, val_holdout: 0.25, size: 8, cache: none}}",
            *("train.epochs=2", "train.batch_size=6", "train.gate_lr=0.1", "decay.weight=20", "slim.threshold=0.5"),
            *("finetune.epochs=1", "finetune.batch_size=6", "train.fast=false", "finetune.fast=false"),
            *overrides,
        ],
    )


def shorten(patch) -> None:
    """Skip rehearsal, export and figures, which take longest; what is exported still differs between models."""

    def weights(model, *_) -> bytes:
        values = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        return hashlib.sha256(values).hexdigest().encode()

    skip_rehearsal(patch)
    patch.setattr("prunekit.pipeline.export.deploy", lambda model, *_, **__: (model, NoRecord))
    patch.setattr("prunekit.pipeline.export.export_onnx", weights)
    patch.setattr("prunekit.pipeline.export.check_onnx", lambda *_: 0.0)
    skip_figures(patch)


@contextmanager
def killed_in(epoch: int):
    """Raise KeyboardInterrupt when the metrics of this epoch are written, and expect it to leave the block."""
    append = RunDir.append_metrics

    def stopped(run, line):
        if line["epoch"] == epoch:
            raise KeyboardInterrupt
        append(run, line)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "append_metrics", stopped)
        yield


def outcome(folder: Path) -> dict[str, object]:
    """Return all results of a complete run, without times."""
    state = json.loads((folder / "state.json").read_text())
    assert "replacing" not in state and state["status"] == "complete"
    run = RunDir.open(folder)
    timed = ("environment.json", "metrics.jsonl", "eval.json", "bench.json")
    found: dict[str, object] = {name: run.read_bytes(name) for name in run.recorded_files() if name not in timed}
    found["summary.json"] = {k: v for k, v in run.read_json("summary.json").items() if k != "seconds"}
    found["metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]
    assert not list(folder.rglob(f"{TEMP_PREFIX}*"))
    # Files that a derived run lacks were never written.
    wrong = [line for line in load_run(folder).problems if not line.endswith(": missing")]
    assert not wrong, wrong
    assert all((folder / name).is_file() for name in run.recorded_files())
    return found
