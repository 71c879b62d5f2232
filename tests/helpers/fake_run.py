"""A complete run folder, created without training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from prunekit.runs import state
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import STAGES

BLOCKS = {"stage0": (1, 20), "stage1": (3, 20), "stage2": (4, 40), "stage3": (6, 80), "stage4": (4, 80)}
UNITS = ("conv1", "depthwise2", "depthwise3")


def layer_rows(seed: int, units=UNITS) -> list[dict]:
    """Return random rows in the shape of CSNet; a fifth of the branches is pruned."""
    random = np.random.default_rng(seed)
    rows, place = [], 0
    for stage, (blocks, width) in BLOCKS.items():
        for block in range(blocks):
            for unit in units:
                for branch in (0, 1):
                    before = width // 2
                    after = 0 if random.random() < 0.2 else int(random.integers(1, before + 1))
                    cost = (before * 9, after * 9) if unit.startswith("depth") else (before * before, before * after)
                    pixels = (64 >> branch) ** 2
                    both = dict(zip(("before", "after"), cost, strict=True))
                    macs = {when: value * pixels for when, value in both.items()}
                    rows.append(
                        {
                            "layer": f"{stage}.{block}.{unit}",
                            "branch": branch,
                            "channels": {"before": before, "after": after},
                            "params": both,
                            "macs": macs,
                            "paper_flops": {w: None if place % 7 == 3 else v * 12 for w, v in macs.items()},
                            "fvcore_macs": macs,
                            "thop_macs": {w: v + before for w, v in macs.items()},
                        }
                    )
                    place += 1
    return rows


def measured(rows: list[dict], when: str, quality: float) -> dict:
    params, macs = (sum(row[key][when] for row in rows) for key in ("params", "macs"))
    metrics = {"max_f": quality, "mae": 0.1 - quality / 20, "s_measure": quality - 0.03, "max_e": quality + 0.02}
    return {"params": params, "macs": macs, "paper_flops": macs * 12, "metrics": metrics}


def gates(rows: list[dict], epochs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return norm → float32 [epochs, channels]; gates of pruned channels decay to 0."""
    random = np.random.default_rng(seed)
    way = np.linspace(0, 1, epochs)[:, None]
    out = {}
    for row in rows:
        before, after = row["channels"]["before"], row["channels"]["after"]
        start, end = random.uniform(0.5, 1, before), np.where(np.arange(before) < after, 0.4, 0.0)
        out[f"{row['layer']}.norms.{row['branch']}"] = (start * (1 - way) + end * way).astype(np.float32)
    return out


def curves(quality: float) -> dict[str, list[float]]:
    recall = np.linspace(0, 1, 256)
    precision = quality * (1 - recall**4 / 2)
    f = 1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-9)
    return {"precision": precision.tolist(), "recall": recall.tolist(), "f": f.tolist()}


def picture(seed: int, colour: bool = False) -> bytes:
    """Return a PNG of 8×8 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3) if colour else (8, 8), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def recipe_text(name: str, seed: int, epochs: int) -> str:
    return f"""name: {json.dumps(name)}
seed: {seed}
backbone:
  name: csnet
task: saliency
data:
  name: salient_shapes
  size: 64
train:
  epochs: {epochs}
  lr: 1e-4
slim:
  threshold: 0.02
finetune:
  epochs: 1
"""


def metrics_line(stage: str, epoch: int, epochs: int) -> dict:
    return {
        "stage": stage,
        "epoch": epoch,
        "step": 10 * epoch,
        "loss": 0.5 / epoch,
        "penalty": 3.0 / epoch,
        "lambda": 30.0,
        "lr": 1e-4,
        "alive": 1000 - 500 * epoch // epochs,
        "of": 1000,
        "metrics": {"mae": 0.1, "max_f": 0.5 + epoch / epochs / 4},
        "seconds": 1.0,
    }


BENCH = [
    {"model": model, "form": form, "batch": 1, "size": [64, 64], "threads": 1, "median_ms": ms, "p10_ms": ms * 0.9,
     "p90_ms": ms * 1.2, "peak_mb": 20.5}
    for model, form, ms in (("dense", "eager", 20.0), ("slim", "eager", 12.5), ("slim", "onnx", 4.25))
]  # fmt: skip
SETS = [
    {"name": name, "folder": f"data/{name}", "model": model, "mode": "size 64", "images": 40, "skipped": 0,
     "metrics": {"max_f": 0.8, "mae": 0.07}, "seconds": 2.5}
    for name in ("ECSSD", "PASCAL-S") for model in ("dense", "finetuned")
]  # fmt: skip

PLAN = {
    "format": 1,
    "groups": {"a": [0, 2]},
    "notes": ["2 groups cannot be pruned: 1 the model's output; 1 the model's input"],
}


def write_run(
    path: Path,
    seed: int = 0,
    baseline: bool = False,
    units=UNITS,
    stop: str | None = None,
    epochs: int = 2,
    measured_too: bool = False,
) -> Path:
    """Write the run folder.

    With ``stop``, the run is interrupted before that stage; with ``measured_too``, it was benchmarked and evaluated on
    two datasets.
    """
    environment = {"prunekit": "0.1.0", "python": "3.11.7", "packages": {"torch": "2.13.0"}, "command": ["prunekit"]}
    with RunDir.start(path, recipe_text(path.name, seed, epochs), environment) as run:
        rows = layer_rows(seed, units)
        for stage in STAGES:
            if stage == stop:
                return path
            run.begin(stage)
            if stage == "train":
                lines = [metrics_line(stage, epoch, epochs) for epoch in range(1, epochs + 1)]
                append_lines(run, lines)
                run.write_arrays("gates.npz", gates(rows, epochs, seed))
                if baseline:
                    run.update_summary("baseline", measured(rows, "before", 0.82))
                run.update_summary("dense", measured(rows, "before", 0.81))
            elif stage == "extract":
                run.write_json("extract/plan.json", PLAN)
            elif stage == "slim":
                run.write_json("slim/plan.json", PLAN)
                write_slim(run, rows)
            elif stage == "finetune":
                append_lines(run, [metrics_line(stage, 1, 1)])
                run.update_summary("finetuned", measured(rows, "after", 0.80))
            elif stage == "evaluate":
                qualities = {"dense": 0.81, "slim": 0.74, "finetuned": 0.80}
                run.write_json("curves.json", {name: curves(quality) for name, quality in qualities.items()})
                write_gallery(run)
            run.add_seconds(stage, 1.5)
            run.end(stage)
        if measured_too:
            run.write_json("bench.json", {"format": 1, "device": "cpu", "rows": BENCH})
            run.write_json("eval.json", {"format": 1, "sets": SETS})
    return path


def change_state(path: Path, **changes) -> None:
    """Set keys of ``state.json`` and update its checksum."""
    (path / "state.json").write_bytes(state.encode({**json.loads((path / "state.json").read_text()), **changes}))


def without_checksum(path: Path, *names: str) -> None:
    """Remove the checksums of these files."""
    held = json.loads((path / "state.json").read_text())["checksums"]
    change_state(path, checksums={name: digest for name, digest in held.items() if name not in names})


def append_lines(run: RunDir, lines: list[dict]) -> None:
    """Append lines with one write, as ``append_metrics`` calls fsync for each line."""
    path = run.path / "metrics.jsonl"
    before = path.read_bytes() if path.exists() else b""
    run.write_bytes("metrics.jsonl", before + b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def write_slim(run: RunDir, rows: list[dict]) -> None:
    counters = {}
    for model, when in (("dense", "before"), ("slim", "after")):
        params, macs = (sum(row[key][when] for row in rows) for key in ("params", "macs"))
        thop = sum(row["thop_macs"][when] for row in rows)
        counters[model] = {
            "prunekit": {"params": params, "macs": macs},
            "fvcore": {"params": params, "macs": macs},
            "thop": {"params": params, "macs": float(thop)},
            "torch": {"macs": macs},
        }
    run.write_json("layers.json", {"format": 1, "size": [64, 64], "layers": rows, "counters": counters})
    run.update_summary("slim", {**measured(rows, "after", 0.74), "paper_flops": None})
    dense, slim = (counters[model]["prunekit"] for model in ("dense", "slim"))
    before, after = (sum(row["channels"][when] for row in rows) for when in ("before", "after"))
    ratios = {f"{key}_ratio": slim[key] / dense[key] for key in ("params", "macs")}
    run.update_summary("kept", {"channels": after, "of": before, **ratios})
    equivalence = {
        "max_abs_diff": 2e-15,
        "tolerance": 1e-6,
        "inputs": [[8, 3, 64, 64]],
        "float32_diff": 3e-7,
        "passed": True,
    }
    run.update_summary("equivalence", equivalence)
    run.update_summary("drift", {"max_abs_diff": 1.5, "mean_abs_diff": 0.2})


def write_gallery(run: RunDir) -> None:
    entries = []
    for index, kind in ((0, None), (1, "best"), (3, "worst")):
        entries.append({"index": index, "name": f"val-{index:05d}", "fixed": index == 0, "kind": kind})
        for place, name in enumerate(("image", "truth", "dense", "slim", "finetuned")):
            run.write_bytes(f"gallery/{index:04d}-{name}.png", picture(10 * index + place, name == "image"))
    run.write_json("gallery/index.json", entries)
