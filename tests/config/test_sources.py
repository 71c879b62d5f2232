# ruff: noqa: F401, F811 (fixtures are imported, and named again as arguments)
from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers.recipe_standins import GOOD, mistake, mistakes, registered, ship, write

from prunekit.config import recipe, sources, yaml
from prunekit.errors import RecipeError

# Overrides


def test_overrides_are_yaml_and_the_last_one_wins(write):
    r = recipe.load(
        write(GOOD),
        [
            "train.lr=1e-4",
            "train.lr=1e-5",
            "finetune={optimizer: sgd, lr: 1}",
            "backbone.options.split=[0.1]",
            "init=on",
        ],
    )
    assert (r.train.lr, r.finetune.lr, r.finetune.epochs, r.init) == (1e-5, 1.0, 1, "on")
    assert r.finetune.optimizer.name == "sgd" and r.backbone.options["split"] == [0.1]


def test_values_may_hold_an_equals_sign(write):
    assert recipe.load(write(GOOD), ["init=a=b"]).init == "a=b"


@pytest.mark.parametrize(
    "text", ["lr", "=1", "train..lr=1", ".=1", " =1", "a\tb=1", "\udc80=1", ".".join("a" * 60) + "=1"]
)
def test_overrides_that_are_none(write, text):
    assert mistake(write(GOOD), [text]).startswith("override ")


def test_base_is_no_override(write):
    assert "base: can stand only in a file" in mistake(write(GOOD), ["base=x"])


@pytest.mark.parametrize("name", ["finetune.optimizer=sgd", "finetune.optimizer.name=sgd", "finetune={optimizer: sgd}"])
@pytest.mark.parametrize("turned", [False, True])
def test_options_given_with_a_new_name_stay_in_any_order(write, name, turned):
    overrides = [name, "finetune.optimizer.options.rate=0.1"]
    r = recipe.load(write(GOOD), overrides[:: -1 if turned else 1])
    assert r.finetune.optimizer == recipe.Named(name="sgd", options={"rate": 0.1})


# Bases


@pytest.mark.parametrize("through", ["base", "override"])
@pytest.mark.parametrize(
    ("held", "new", "kept"),
    [
        ({"name": "adam", "options": {"rate": 9}}, {"name": "sgd"}, False),
        ({"name": "adam", "options": {"rate": 9}}, "sgd", False),
        ({"name": "adam", "options": {"rate": 9}}, {"name": "adam"}, True),
        ({"name": "adam", "options": {"rate": 9}}, "adam", True),
        ({"name": "adam", "options": {"rate": 9}}, {}, True),
        ({"options": {"rate": 9}}, "sgd", False),
        ({"options": {"rate": 9}}, "adam", True),
        ("sgd", {"options": {"rate": 9}}, True),
    ],
)
def test_a_new_name_drops_the_options_of_the_old_one(write, through, held, new, kept):
    tree = yaml.parse(GOOD).value
    tree["train"]["optimizer"] = held
    text = yaml.dump(tree)
    if through == "base":
        write(text, "below.yaml")
        r = recipe.load(write(yaml.dump({"base": "below.yaml", "train": {"optimizer": new}})))
    else:
        flow = repr(new).replace("'", '"')
        r = recipe.load(write(text), [f"train.optimizer={flow}"])
    assert r.train.optimizer.options == {"rate": 9.0 if kept else 0.5}


def test_merges_mappings_and_replaces_the_rest(write):
    write(GOOD.replace("{width: 3}", "{width: 3, split: [1, 2, 3], depth: 5}"), "below.yaml")
    write("base: below.yaml\nseed: 7\ntrain: {lr: 1}\n", "middle.yaml")
    r = recipe.load(write("base: middle.yaml\nbackbone: {options: {split: [4]}}\ntrain: {epochs: 9}\n"))
    assert r.backbone.options == {"width": 3, "split": [4.0], "depth": 5, "mode": None}
    assert (r.seed, r.train.epochs, r.train.lr) == (7, 9, 1.0)


def test_base_stands_beside_its_file_wherever_one_is(write):
    Path("deep").mkdir()
    write(GOOD, "deep/below.yaml")
    write("base: below.yaml\n", "deep/r.yaml")
    assert recipe.load("deep/r.yaml").train.epochs == 2
    assert "base: 'below.yaml': no such file" in mistake(write("base: below.yaml\n"))


def test_mistakes_name_the_file_that_the_value_came_from(write):
    write(GOOD.replace("epochs: 2", "epochs: x\n  lr: 0"), "below.yaml")
    assert mistakes(write("base: below.yaml\nseed: x\ntrain: {lr: 1}\n")) == [
        "r.yaml:2:1: seed: 'x' is not a whole number; give one, such as 10",
        "below.yaml:8:3: train.epochs: 'x' is not a whole number; give one, such as 10",
    ]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bases_in_a_circle(write, length):
    names = [f"{i}.yaml" for i in range(length)]
    for name, following in itertools.pairwise([*names, names[0]]):
        write(f"base: {following}\n", name)
    line = mistake(names[0])
    assert line.startswith(f"{names[-1]}:1:1: base: the bases go in a circle ({' → '.join([*names, names[0]])})")


def test_a_base_that_cannot_be_had_leaves_the_other_mistakes(write, ship):
    ship(csnet=GOOD)
    assert mistakes(write("base: csnt\ntrain: {lr: x}\n")) == [
        "r.yaml:1:1: base: 'csnt': no such file, nor a shipped recipe of this name; "
        "did you mean 'csnet'? shipped: csnet",
        "r.yaml:2:9: train.lr: 'x' is not a number; give one, such as 0.1",
    ]
    assert "base: 3 is not text" in mistake(write("base: 3"))
    assert "base: '\\x00'" in mistake(write('base: "\\0"'))
    assert mistake(write("base: below.yaml\n") and write("base: [", "below.yaml") and "r.yaml").startswith(
        "below.yaml:1:"
    )


# Finding


def test_shipped_recipes_are_found_by_bare_name_and_serve_as_bases(write, ship):
    package = ship(csnet=GOOD, other="base: csnet.yaml\nseed: 5\n")
    assert sources.shipped_recipes() == ["csnet", "other"]
    assert sources.find_recipe("csnet") == sources.find_recipe("csnet.yaml") == package / "csnet.yaml"
    assert recipe.load("other").seed == 5
    assert recipe.load(write("base: other\nname: mine\n")).seed == 5


def test_a_file_comes_before_a_shipped_recipe_and_a_folder_after_it(write, ship):
    package = ship(csnet=GOOD)
    Path("csnet").mkdir()
    assert sources.find_recipe("csnet") == package / "csnet.yaml"
    assert sources.find_recipe(write(GOOD, "csnet.yaml")) == Path("csnet.yaml")


def test_a_recipe_that_is_not_there(write, ship):
    ship(csnet=GOOD, other=GOOD)
    for name in ("csnt", "csnt.yaml", Path("recipes/csnt.yaml")):
        with pytest.raises(RecipeError, match=r"no such file.*did you mean 'csnet'\? shipped: csnet, other$"):
            sources.find_recipe(name)
    for name in ("", "x" * 5000, "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(RecipeError):
            sources.find_recipe(name)


def test_a_folder_is_no_recipe(write):
    Path("runs").mkdir()
    with pytest.raises(RecipeError, match="runs: is a folder, not a recipe"):
        sources.find_recipe("runs")
    write(GOOD, "runs/recipe.yaml")
    with pytest.raises(RecipeError, match=r"did you mean runs/recipe\.yaml\?"):
        sources.find_recipe("runs")


def test_a_file_that_cannot_be_read(write, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    write(GOOD)
    monkeypatch.setattr(Path, "open", refuse)  # Permissions do not bind root, who may run the tests.
    assert mistake("r.yaml") == "r.yaml: cannot be read (Permission denied); mend its permissions or path"
