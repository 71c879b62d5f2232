"""Checks of every recipe in the repository."""

import re
import runpy
from pathlib import Path

import pytest

from prunekit.backbones import build
from prunekit.config import registry, user_module
from prunekit.config.overrides import shipped_recipes
from prunekit.config.recipe import load

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for folder in ("recipes", "examples") for path in (ROOT / folder).rglob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def example_plugins():
    """Register the builders of the example packages."""
    with pytest.MonkeyPatch.context() as patch:
        for table in (value for value in vars(registry).values() if isinstance(value, registry.Registry)):
            table.names()  # loads the plugins
            patch.setattr(table, "_entries", dict(table._entries))
        patch.setattr(user_module, "_modules", dict(user_module._modules))
        for setup in (ROOT / "examples").glob("*/setup.cfg"):
            for file in setup.parent.glob("*.py"):
                runpy.run_path(str(file), run_name=file.stem)
        yield


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_loads_and_its_backbone_builds(path, tmp_path):
    overrides = [f"data.root={tmp_path}"] if re.search("name: (image_)?folder", path.read_text()) else []
    recipe = load(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.dump())
    assert load(again) == recipe
    build(recipe.backbone.name, recipe.backbone.options, recipe.backbone.file)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_header_says_what_it_is_and_how_to_launch_and_override_it(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0].startswith("# ") and head[0].endswith(".") and len(head[0]) <= 120
    launches = [line for line in head if "prunekit run" in line]
    assert f"prunekit run {path.relative_to(ROOT)}" in launches[0]
    assert any("=" in line.partition(path.name)[2] for line in launches)


def test_shipped_recipes():
    assert set(shipped_recipes()) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert load("csnet").name == "csnet"


def test_the_published_schedule():
    recipe = load("csnet_duts_paper", ["data.root=somewhere"])
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.lr, recipe.data.size) == (300, 24, 1e-4, 224)
    assert recipe.train.optimizer.options == {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 5e-3}
    milestones = recipe.train.schedule.options["milestones"]
    assert [round(300 * m) for m in milestones] == [200, 250]
