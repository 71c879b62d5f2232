"""The order of the stages and of the trainings among them; who makes what."""

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


def test_trainings_stand_in_the_order_in_which_they_are_done():
    done = ["train", "baseline", "extract", "slim", "step2", "step10", "finetune", "evaluate"]
    names = sorted(done)
    assert names != done and sorted(names, key=training_position) == done


@pytest.mark.parametrize("name", ["prune", "step", "stepone", "step-1", "Train", ""])
def test_what_is_no_stage_is_refused_with_those_that_are(name):
    with pytest.raises(RunFolderError, match=", ".join(STAGES)):
        training_position(name)


def test_a_file_is_made_by_the_stage_of_its_folder():
    assert stage_that_writes("dense/model.safetensors") == stage_that_writes("dense") == "train"
    assert stage_that_writes("exports/model.onnx") == "export" and stage_that_writes("recipe.yaml") is None
    for by in (*FILE_STAGES.values(), *SUMMARY_STAGES.values()):
        stage_index(by)
