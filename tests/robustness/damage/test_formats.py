"""Formats of run folders: other ones are refused with one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.fake_run import change_state
from helpers.run_readers import READERS, predicted
from helpers.toy_run import quiet

from prunekit.errors import PrunekitError, RunFolderError
from prunekit.pipeline.runner import run_recipe

SOAK = int(os.environ.get("PRUNEKIT_SOAK", "0"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("missing", [None, "state.json"])
def test_format_1_is_refused_with_remedy(run_set, tmp_path, reader, missing):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    for name in ("state.json", "summary.json"):
        with_format(run, name, 1)
    if missing is not None:
        (run / missing).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        RunFolderError, match=r"has format 1, written by .*prunekit.*prunekit run .*recipe\.yaml --out"
    ) as error:
        READERS[reader](run, run_set)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---- formats

ABSURD = ["x", -1, 0, 1e999, None, True, 1.5, [], {}]


def with_format(run: Path, name: str, value: object) -> None:
    """Set the format of a file, with a valid checksum."""
    path = run / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": value}))
    if name.startswith("checkpoints") or name == "state.json":
        return
    sums = json.loads((run / "state.json").read_text())["checksums"]
    change_state(run, checksums={k: v for k, v in sums.items() if k != name})


# File → the newest format that is read, and commands that read it.
FORMATS = {
    "state.json": (2, ("predict", "report", "resume", "again")),
    "summary.json": (2, ("predict", "report", "resume")),
    "finetuned/plan.json": (1, ("predict", "groups")),
    "slim/plan.json": (1, ("again", "report")),
    "eval.json": (1, ("eval", "report")),
    "bench.json": (1, ("report",)),
    "layers.json": (1, ("report",)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_newer_format_is_refused_with_required_version(run_set, tmp_path, name):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    newest, readers = FORMATS[name]
    with_format(run, name, newest + 1)
    for reader in readers:
        try:
            text = READERS[reader](run, run_set)
        except PrunekitError as error:
            text = str(error)
            assert "\n" not in text
        said = next(line for line in text.splitlines() if f"format {newest + 1}" in line)
        assert f"up to {newest}" in said and "pip install --upgrade prunekit" in said, said
        assert name in said or "written by prunekit" in said


@pytest.mark.parametrize("name", FORMATS)
def test_impossible_format_is_damage(run_set, tmp_path, name):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    for value in ABSURD:
        with_format(run, name, value)
        for reader in FORMATS[name][1][: None if SOAK else 2]:
            try:
                text = READERS[reader](run, run_set)
            except PrunekitError as error:
                text = str(error)
                assert "\n" not in text
            assert name in text, (value, reader, text)


def test_newer_checkpoint_is_refused(run_set, tmp_path):
    run = Path(shutil.copytree(run_set.broken, tmp_path / "toy"))
    with_format(run, "checkpoints/train-0002.json", 2)
    with pytest.raises(PrunekitError, match=r"train-0002 has format 2.*pip install --upgrade") as error:
        run_recipe(run_set.recipe, run, quiet(), resume=True)
    assert "\n" not in str(error.value)


def test_key_of_newer_recipe_is_reported(run_set, tmp_path):
    run = Path(shutil.copytree(run_set.whole, tmp_path / "toy"))
    (run / "recipe.yaml").write_text("novelty: 3\n" + (run / "recipe.yaml").read_text())
    sums = json.loads((run / "state.json").read_text())["checksums"]
    change_state(run, checksums={k: v for k, v in sums.items() if k != "recipe.yaml"}, prunekit="9.1")
    with pytest.raises(PrunekitError, match=r"does not know the key novelty.*written by prunekit 9\.1"):
        predicted(run, run_set)
