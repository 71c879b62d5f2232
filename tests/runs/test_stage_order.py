"""Order of stages and trainings, and what each stage writes."""

import pytest

from prunekit.errors import RunFolderError
from prunekit.runs.stage_order import (
    FILE_STAGES,
    STAGES,
    SUMMARY_STAGES,
    stage_index,
    stage_that_writes,
    training_position,
)


def test_trainings_are_sorted_in_order_of_execution():
    done = ["train", "baseline", "extract", "slim", "step2", "step10", "finetune", "evaluate"]
    names = sorted(done)
    assert names != done and sorted(names, key=training_position) == done


@pytest.mark.parametrize("name", ["prune", "step", "stepone", "step-1", "Train", ""])
def test_unknown_stage_is_refused_with_known_ones(name):
    with pytest.raises(RunFolderError, match=", ".join(STAGES)):
        training_position(name)


def test_stage_that_writes_a_file():
    assert stage_that_writes("dense/model.safetensors") == stage_that_writes("dense") == "train"
    assert stage_that_writes("exports/model.onnx") == "export" and stage_that_writes("recipe.yaml") is None
    for by in (*FILE_STAGES.values(), *SUMMARY_STAGES.values()):
        stage_index(by)
