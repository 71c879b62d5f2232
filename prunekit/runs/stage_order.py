"""The stages of a run: their order, the trainings within them, and the files and summary entries that each writes."""

from __future__ import annotations

import re

from prunekit.errors import RunFolderError

STAGES = ("train", "extract", "slim", "finetune", "evaluate", "export", "report")
GRADUAL_PRUNING = "gradual_pruning"  # the part of the stage train that depends on the target
# File or folder of a run → the stage that writes it.
FILE_STAGES = {
    "metrics.jsonl": "train",
    "classes.json": "train",
    "gates.npz": "train",
    "dense": "train",
    "baseline": "train",
    "extract": "extract",
    "layers.json": "slim",
    "slim": "slim",
    "finetuned": "finetune",
    "curves.json": "evaluate",
    "gallery": "evaluate",
    "model.onnx": "export",
    "exports": "export",
}
# Entry of summary.json → the stage that writes it.
SUMMARY_STAGES = {
    "baseline": "train",
    "dense": "train",
    "slim": "slim",
    "kept": "slim",
    "equivalence": "slim",
    "drift": "slim",
    "latency": "slim",
    "recalibrated": "finetune",
    "finetuned": "finetune",
    "reference": "evaluate",
    "export": "export",
}


def stage_index(stage: str) -> int:
    """Return the position of a stage in :data:`STAGES`; raise RunFolderError if there is no such stage."""
    if stage not in STAGES:
        raise RunFolderError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    return STAGES.index(stage)


def is_training(name: str) -> bool:
    """Return whether a training of a run has this name."""
    return re.fullmatch(r"train|baseline|step\d+|finetune", name) is not None


def training_position(name: str) -> tuple[int, int]:
    """Return the sort key of a training: named after its stage, or "baseline" (after "train"), or "step1" … (slim)."""
    if name == "baseline":
        return stage_index("train"), 1
    number = name.removeprefix("step")
    return (stage_index("slim"), int(number)) if number != name and number.isdecimal() else (stage_index(name), 0)


def stage_that_writes(name: str) -> str | None:
    """Return the stage that writes this file or its top-level folder; None for files that no single stage writes."""
    return FILE_STAGES.get(name.partition("/")[0])
