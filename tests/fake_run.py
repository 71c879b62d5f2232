"""A run folder with everything the report reads, and no training behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prunekit.rundir import STAGES, RunDir

BLOCKS = {"stage0": (1, 20), "stage1": (3, 20), "stage2": (4, 40), "stage3": (6, 80), "stage4": (4, 80)}
UNITS = ("conv1", "depthwise2", "depthwise3")


def layer_rows(seed: int, units=UNITS) -> list[dict]:
    """Random rows shaped as those of CSNet; a fifth of the branches is gone."""
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


def write_run(path: Path, seed: int = 0, baseline: bool = False, units=UNITS, stop: str | None = None) -> Path:
    """Write the run folder; with ``stop`` the run is interrupted in front of that stage."""
    with RunDir.start(path, f"name: {path.name}\nseed: {seed}\ntrain:\n  lr: 1e-4\n", {"python": "3.11"}) as run:
        rows = layer_rows(seed, units)
        for stage in STAGES:
            if stage == stop:
                return path
            run.begin(stage)
            if stage == "train":
                for epoch in (1, 2):
                    run.append_metrics({"stage": stage, "epoch": epoch, "loss": 0.5 / epoch, "metrics": {"mae": 0.1}})
                if baseline:
                    run.update_summary("baseline", measured(rows, "before", 0.82))
                run.update_summary("dense", measured(rows, "before", 0.81))
            elif stage == "extract":
                run.write_json("plan.json", {"format": 1, "groups": {"a": [0, 2]}})
            elif stage == "slim":
                counters = {}
                for model, when in (("dense", "before"), ("slim", "after")):
                    params, macs = (sum(row[key][when] for row in rows) for key in ("params", "macs"))
                    thop = sum(row["thop_macs"][when] for row in rows)
                    counters[model] = {
                        "ours": {"params": params, "macs": macs},
                        "fvcore": {"params": params, "macs": macs},
                        "thop": {"params": params, "macs": float(thop)},
                        "torch": {"macs": macs},
                    }
                run.write_json("layers.json", {"format": 1, "size": [64, 64], "layers": rows, "counters": counters})
                run.update_summary("slim", {**measured(rows, "after", 0.74), "paper_flops": None})
            elif stage == "finetune":
                run.update_summary("finetuned", measured(rows, "after", 0.80))
            run.add_seconds(stage, 1.5)
            run.end(stage)
    return path
