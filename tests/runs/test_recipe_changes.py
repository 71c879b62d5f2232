import os
from pathlib import Path

import pytest
from helpers.small_run import BY_THRESHOLD

from prunekit.config.recipe import load
from prunekit.config.schema import Recipe, all_keys, get_section
from prunekit.errors import RunFolderError
from prunekit.runs.recipe_changes import first_stage
from prunekit.runs.run_dir import RunDir
from prunekit.runs.stage_order import GRADUAL_PRUNING, STAGES


def started(path, done, *overrides):
    """A run folder with these stages done."""
    run = RunDir.start(path, load("csnet", [*BY_THRESHOLD, *overrides]).dump(), {})
    for stage in done:
        run.end(stage)
    run.close()


def resume(path, *overrides, **flags):
    recipe = load("csnet", [*BY_THRESHOLD, *overrides]).dump()
    with RunDir.start(path, recipe, {}, resume=True, **flags) as run:
        assert run.read_text("recipe.yaml") == recipe


@pytest.mark.parametrize(
    "done, override",
    [
        (STAGES[:5], "export.onnx=false"),
        (STAGES[:1], "slim.threshold=0.1"),
        (STAGES[:2], "finetune.epochs=9"),
        (STAGES[:3], "finetune.optimizer=sgd"),
        (STAGES[:3], "slim.recalibrate=2"),
        (STAGES, "data.cache=none"),
        (STAGES, "finetune.on_nonfinite=skip"),
    ],
)
def test_a_key_of_a_later_stage_may_change(tmp_path, done, override):
    started(tmp_path / "run", done)
    resume(tmp_path / "run", override)


@pytest.mark.parametrize(
    "done, override, words",
    [
        ((), "seed=3", ["seed cannot change"]),
        ((), "train.lr=1", ["train.lr cannot change"]),
        (STAGES[:1], "data.size=96", ["data.size cannot change"]),
        (STAGES[:1], "train.epochs=99", ["train.epochs", "further in a new one: init={run} --out DIR"]),
        ((), "train.epochs=1", ["train.epochs cannot change now; use the old value, or --overwrite"]),
        (STAGES, "export.onnx=false", ["export.onnx", "--from export to repeat"]),
        (STAGES[:4], "slim.threshold=0.1", ["slim.threshold", "--from extract"]),
        (STAGES[:4], "finetune.epochs=9", ["finetune.epochs", "--from finetune"]),
    ],
)
def test_a_key_of_a_started_stage_may_not_change(tmp_path, done, override, words):
    path = tmp_path / "run"
    started(path, done)
    with pytest.raises(RunFolderError, match="was started with another recipe") as caught:
        resume(path, override)
    for word in words:
        assert word.format(run=path) in str(caught.value).splitlines()[0]
    assert ("--from" in str(caught.value)) == ("--from" in " ".join(words))


@pytest.mark.parametrize("first, override", [("export", "export.onnx=false"), ("extract", "slim.threshold=0.1")])
def test_a_key_may_change_with_the_stages_that_are_repeated(tmp_path, first, override):
    started(tmp_path / "run", STAGES)
    resume(tmp_path / "run", override, repeat_from=first)
    # A kill before restart_from leaves nothing that follows another recipe.
    assert RunDir.open(tmp_path / "run").done == list(STAGES[: STAGES.index(first)])
    with pytest.raises(RunFolderError, match=r"train\.lr"):
        resume(tmp_path / "run", override, "train.lr=1", repeat_from=first)


def test_a_training_in_progress_keeps_its_keys(tmp_path):
    started(tmp_path / "run", STAGES[:3])
    with RunDir.open(tmp_path / "run", write=True) as run:
        run.begin("finetune")
        run.save_checkpoint("finetune", 1, {}, {}, keep=1)
    with pytest.raises(RunFolderError, match=r"finetune\.lr"):
        resume(tmp_path / "run", "finetune.lr=1")
    resume(tmp_path / "run", "export.openvino=true")


def test_first_stage_depends_on_other_keys():
    plain, stepped, target, gradual = (
        load("csnet", [*BY_THRESHOLD, *overrides])
        for overrides in (
            (),
            ("slim.steps=3", "target.params_ratio=0.5"),
            ("target.params_ratio=0.5",),
            ("train.gradual_pruning.start=0.25",),
        )
    )
    assert first_stage(("finetune", "lr"), [plain, plain]) == "finetune"
    assert first_stage(("finetune", "lr"), [plain, stepped]) == "slim"
    assert first_stage(("slim", "min_channels"), [plain, plain]) == "extract"
    assert first_stage(("target", "params_ratio"), [plain, target]) == "extract"
    # Channels are chosen during training.
    assert first_stage(("slim", "min_channels"), [plain, gradual]) == "gradual_pruning"
    assert first_stage(("target", "params_ratio"), [gradual, gradual]) == "gradual_pruning"
    assert first_stage(("train", "gradual_pruning", "end"), [gradual, gradual]) == "gradual_pruning"
    assert first_stage(("train", "gradual_pruning", "start"), [gradual, gradual]) == "train"


def test_every_section_has_a_stage_or_is_what_a_run_starts_from():
    recipe = load("csnet")
    found = {key[0]: first_stage(key, [recipe]) for key in all_keys() if get_section(key) is None}
    assert {section for section, stage in found.items() if stage is None} == {
        *("name", "seed", "init", "init_weights", "backbone", "task", "data")
    }
    assert set(found) == set(Recipe.model_fields) and set(filter(None, found.values())) <= {*STAGES, GRADUAL_PRUNING}


def test_a_relative_path_of_an_older_version_is_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    recipe = load("csnet", ["data={name: folder, root: photos}"])
    assert recipe.data.root == os.path.realpath("photos")
    old = recipe.dump().replace(recipe.data.root, "photos")
    RunDir.start(tmp_path / "run", old, {}).close()
    with RunDir.start(tmp_path / "run", recipe.dump(), {}, resume=True) as run:
        assert run.read_text("recipe.yaml") == recipe.dump()
    Path("others").mkdir()
    with pytest.raises(RunFolderError, match=r"data\.root"):
        RunDir.start(tmp_path / "run", load("csnet", ["data={name: folder, root: others}"]).dump(), {}, resume=True)
