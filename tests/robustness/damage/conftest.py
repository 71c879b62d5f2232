"""Runs to be damaged, and the results of the commands without damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.run_readers import READERS, RunSet
from helpers.toy_run import killed_in, quiet, shorten, toy_recipe, write_photos

from prunekit.commands import bench
from prunekit.commands.bench import bench_run
from prunekit.commands.evaluate import evaluate
from prunekit.deployment.bench.timing import Timing
from prunekit.pipeline.runner import run_recipe


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(
            bench, "measure", lambda jobs, *_: ([Timing([1.0], 1.0, 1.0, 1.0) for _ in jobs], {1: 1.0}, False)
        )
        yield


@pytest.fixture(scope="module")
def run_set(tmp_path_factory):
    here = tmp_path_factory.mktemp("runs")
    photos = write_photos(here / "photos")
    recipe = toy_recipe(photos)
    # With another seed: every file fits, and differs.
    others = toy_recipe(photos, "seed=1", "train.epochs=3")
    for name, one in (("whole", recipe), ("other", others)):
        run_recipe(one, here / name / "toy", quiet())
        evaluate(here / name / "toy", [f"photos={photos}"], quiet())
        bench_run(here / name / "toy", quiet(), forms="eager", threads="1")
    for name, one in (("broken", recipe), ("other_broken", others)):
        with killed_in(2):
            run_recipe(one, here / name / "toy", quiet())
    return RunSet(photos, recipe, *(here / name / "toy" for name in ("whole", "other", "broken", "other_broken")))


@pytest.fixture(scope="module")
def good(run_set, tmp_path_factory):
    """Return a function from a command to its result for the undamaged run."""
    made: dict[str, object] = {}

    def of(reader: str) -> object:
        if reader not in made:
            run = tmp_path_factory.mktemp(reader) / "toy"
            made[reader] = READERS[reader](Path(shutil.copytree(run_set.whole, run)), run_set)
        return made[reader]

    return of
