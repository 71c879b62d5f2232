# ruff: noqa: F401, F811 (fixtures are imported, and named again as arguments)
from pathlib import Path

import pytest
from helpers.recipe_standins import GOOD, registered, ship, write

from prunekit.commands.copy_recipe import copy_recipe
from prunekit.config import recipe
from prunekit.config.overrides import shipped_recipes
from prunekit.errors import RecipeError


def test_copy_keeps_comments_and_names_the_copy_in_commands(write, ship):
    ship(csnet=f"# A recipe.\n#\n#   prunekit run recipes/csnet.yaml\n{GOOD}# the end\n")
    assert copy_recipe("csnet", Path("mine.yaml")) == Path("mine.yaml")
    assert Path("mine.yaml").read_text() == f"# A recipe.\n#\n#   prunekit run mine.yaml\n{GOOD}# the end\n"


def test_copy_into_a_folder(write, ship):
    ship(csnet=GOOD)
    Path("recipes").mkdir()
    assert copy_recipe("csnet", Path("recipes")) == Path("recipes/csnet.yaml")


@pytest.mark.parametrize("text", ["net.py", "'net.py'  # mine", '"net.py"', "./net.py"])
def test_relative_paths_still_resolve_from_the_copy(write, text):
    Path("a").mkdir()
    write("def build(width: int = 3): ...", "a/net.py")
    write(GOOD, "a/below.yaml")
    write(f"base: below.yaml  # a base\nbackbone: {{name: build, options: {{width: 4}}, file: {text}\n}}\n", "a/r.yaml")
    copy = copy_recipe("a/r.yaml", Path("b/c/copy.yaml"))
    assert recipe.load(copy) == recipe.load("a/r.yaml")
    assert "# a base" in copy.read_text()


def test_a_shipped_base_and_absolute_paths_are_unchanged(write, ship):
    ship(csnet=GOOD)
    text = "base: csnet\nbackbone: {file: /nowhere/net.py}\n"
    write(text)
    assert copy_recipe("r.yaml", Path("copy.yaml")).read_text() == text


def test_existing_file_is_kept_without_overwrite(write, ship):
    ship(csnet=GOOD)
    write("old", "mine.yaml")
    with pytest.raises(RecipeError, match=r"^mine\.yaml: already exists; choose another file or use --overwrite$"):
        copy_recipe("csnet", Path("mine.yaml"))
    assert Path("mine.yaml").read_text() == "old"
    copy_recipe("csnet", Path("mine.yaml"), overwrite=True)
    assert Path("mine.yaml").read_text() == GOOD
    with pytest.raises(RecipeError, match=r"already exists; choose another file$"):
        copy_recipe("mine.yaml", Path("mine.yaml"), overwrite=True)


def test_missing_and_invalid_recipes(write):
    with pytest.raises(RecipeError, match="no such file or shipped recipe"):
        copy_recipe("gone.yaml", Path("mine.yaml"))
    write("a: [", "r.yaml")
    with pytest.raises(RecipeError, match=r"^r\.yaml:1:5: invalid YAML"):
        copy_recipe("r.yaml", Path("mine.yaml"))
    assert not Path("mine.yaml").exists()


def test_every_shipped_recipe_copies_to_an_equal_recipe(tmp_path):
    for name, path in shipped_recipes().items():
        copy = copy_recipe(name, tmp_path)
        assert copy.read_text() == path.read_text().replace(f"recipes/{name}.yaml", str(copy))
