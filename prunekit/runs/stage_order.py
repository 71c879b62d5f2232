"""The stages of a run: their order, where each training stands among them, and what each of them makes."""

from __future__ import annotations

from prunekit.errors import RunFolderError

STAGES = ("train", "extract", "slim", "finetune", "evaluate", "export", "report")
# Files and folders of a run → the stage that makes them.
FILE_STAGES = {
    "metrics.jsonl": "train",
    "classes.json": "train",
    "gates.npz": "train",
    "shrunk.json": "train",
    "dense": "train",
    "baseline": "train",
    "plan.json": "extract",
    "layers.json": "slim",
    "slim": "slim",
    "finetuned": "finetune",
    "curves.json": "evaluate",
    "gallery": "evaluate",
    "model.onnx": "export",
    "exports": "export",
}
# Parts of summary.json → the stage that makes them.
SUMMARY_STAGES = {
    "baseline": "train",
    "dense": "train",
    "shrunk": "train",
    "slim": "slim",
    "kept": "slim",
    "equivalence": "slim",
    "drift": "slim",
    "recalibrated": "finetune",
    "finetuned": "finetune",
    "reference": "evaluate",
    "export": "export",
}


def stage_index(stage: str) -> int:
    """The place of a stage in :data:`STAGES`.

    Raises:
        RunFolderError: no such stage.
    """
    if stage not in STAGES:
        raise RunFolderError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    return STAGES.index(stage)


def training_position(name: str) -> tuple[int, int]:
    """Where a training stands among the stages: it is one, or "baseline" behind it within the stage train, or "step1",
    "step2" … within the stage slim; raises as :func:`stage_index` does."""
    if name == "baseline":
        return stage_index("train"), 1
    number = name.removeprefix("step")
    return (stage_index("slim"), int(number)) if number != name and number.isdecimal() else (stage_index(name), 0)


def stage_that_writes(name: str) -> str | None:
    """The stage that makes this file, or the folder that it is in; None for what no stage makes alone."""
    return FILE_STAGES.get(name.partition("/")[0])
