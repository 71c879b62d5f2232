"""Folders of an older prunekit are read; those of a newer one are refused with what they need."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.fake_run import change_state
from helpers.run_readers import READERS, predicted
from helpers.toy_run import outcome, quiet

from prunekit.errors import PrunekitError
from prunekit.pipeline.runner import run_recipe

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))


def older(run: Path) -> Path:
    """The folder as a prunekit has left it that knew nothing of runs' ids, of checksums of the state and of metrics."""
    state = json.loads((run / "state.json").read_text())
    del state["checksums"]["metrics.jsonl"]
    text = json.dumps({k: v for k, v in state.items() if k not in ("run", "check", "replacing")})
    (run / "state.json").write_text(text)
    for path in (run / "checkpoints").glob("*.json"):
        written = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in written.items() if k != "run"}))
    return run


@pytest.mark.parametrize("reader", READERS if SOAK else ["report", "predict", "eval", "finetune", "again"])
def test_a_folder_of_an_older_prunekit_is_read(bed, good, tmp_path, reader):
    found = READERS[reader](older(Path(shutil.copytree(bed.whole, tmp_path / "toy"))), bed)
    wanted = good(reader)
    assert found == wanted or {**wanted, **found} == wanted


def test_a_run_that_an_older_prunekit_broke_off_goes_on(bed, tmp_path):
    run = older(Path(shutil.copytree(bed.broken, tmp_path / "toy")))
    # It knew fewer keys, too.
    lines = [line for line in (run / "recipe.yaml").read_text().splitlines() if "prune_every" not in line]
    assert len(lines) < len((run / "recipe.yaml").read_text().splitlines())
    (run / "recipe.yaml").write_text("\n".join([*lines, ""]))
    sums = json.loads((run / "state.json").read_text())["checksums"]
    del sums["recipe.yaml"]
    held = json.loads((run / "state.json").read_text())
    (run / "state.json").write_text(json.dumps({**held, "checksums": sums}))
    run_recipe(bed.recipe, run, quiet(), resume=True)
    found, wanted = outcome(run), outcome(bed.whole)
    assert {k: v for k, v in found.items() if k != "recipe.yaml"} == {k: wanted[k] for k in found if k != "recipe.yaml"}


# ---- formats

ABSURD = ["x", -1, 0, 1e999, None, True, 1.5, [], {}]


def with_format(run: Path, name: str, value: object) -> None:
    """As if prunekit had written it."""
    path = run / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": value}))
    if name.startswith("checkpoints") or name == "state.json":
        return
    sums = json.loads((run / "state.json").read_text())["checksums"]
    change_state(run, checksums={k: v for k, v in sums.items() if k != name})


FORMATS = {
    "state.json": ("predict", "report", "resume", "again"),
    "summary.json": ("predict", "report", "resume"),
    "plan.json": ("predict", "groups", "report"),
    "eval.json": ("eval", "report"),
    "bench.json": ("report",),
    "layers.json": ("report",),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_newer_format_is_refused_with_what_it_needs(bed, tmp_path, name):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    with_format(run, name, 2)
    for reader in FORMATS[name]:
        try:
            text = READERS[reader](run, bed)
        except PrunekitError as error:
            text = str(error)
            assert "\n" not in text
        said = next(line for line in text.splitlines() if "format 2" in line)
        assert "up to 1" in said and "pip install --upgrade prunekit" in said, said
        assert name in said or "written by prunekit" in said


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_never_was_is_damage(bed, tmp_path, name):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    for value in ABSURD:
        with_format(run, name, value)
        for reader in FORMATS[name][: None if SOAK else 2]:
            try:
                text = READERS[reader](run, bed)
            except PrunekitError as error:
                text = str(error)
                assert "\n" not in text
            assert name in text, (value, reader, text)


def test_a_newer_training_state_is_not_passed_over(bed, tmp_path):
    run = Path(shutil.copytree(bed.broken, tmp_path / "toy"))
    with_format(run, "checkpoints/train-0002.json", 2)
    with pytest.raises(PrunekitError, match=r"train-0002 has format 2.*pip install --upgrade") as error:
        run_recipe(bed.recipe, run, quiet(), resume=True)
    assert "\n" not in str(error.value)


def test_a_key_of_a_newer_recipe_is_told(bed, tmp_path):
    run = Path(shutil.copytree(bed.whole, tmp_path / "toy"))
    (run / "recipe.yaml").write_text("novelty: 3\n" + (run / "recipe.yaml").read_text())
    sums = json.loads((run / "state.json").read_text())["checksums"]
    change_state(run, checksums={k: v for k, v in sums.items() if k != "recipe.yaml"}, prunekit="9.1")
    with pytest.raises(PrunekitError, match=r"does not know the key novelty.*written by prunekit 9\.1"):
        predicted(run, bed)
