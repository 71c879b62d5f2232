# ruff: noqa: F401, F811 (fixtures are imported, and named again as arguments)
from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from helpers.recipe_standins import GOOD, load_error, load_errors, registered, ship, write

from prunekit.config import overrides, recipe, yaml
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


def test_override_values_may_contain_an_equals_sign(write):
    assert recipe.load(write(GOOD), ["init=a=b"]).init == "a=b"


@pytest.mark.parametrize(
    "text", ["lr", "=1", "train..lr=1", ".=1", " =1", "a\tb=1", "\udc80=1", ".".join("a" * 60) + "=1"]
)
def test_invalid_overrides(write, text):
    assert load_error(write(GOOD), [text]).startswith("override ")


def test_base_is_not_an_override(write):
    assert "base: is allowed only in a file" in load_error(write(GOOD), ["base=x"])


@pytest.mark.parametrize("name", ["finetune.optimizer=sgd", "finetune.optimizer.name=sgd", "finetune={optimizer: sgd}"])
@pytest.mark.parametrize("turned", [False, True])
def test_overrides_of_name_and_options_work_in_any_order(write, name, turned):
    overrides = [name, "finetune.optimizer.options.rate=0.1"]
    r = recipe.load(write(GOOD), overrides[:: -1 if turned else 1])
    assert r.finetune.optimizer == recipe.Component(name="sgd", options={"rate": 0.1})


@pytest.mark.parametrize("text", ["decay=l1", "decay={name: l1}"])
def test_a_name_alone_sets_any_section_that_names_a_builder(write, text):
    below = GOOD.replace("{width: 3}", "{width: 3, split: [1]}") + "decay: {weight: 5, options: {momentum: 1}}\n"
    r = recipe.load(write(below), [text, "backbone=toy"])
    assert (r.decay.name, r.decay.weight, r.decay.options) == ("l1", 5, {"power": 1.0, "limit": None})
    assert (r.backbone.name, r.backbone.options["split"]) == ("toy", [1.0])
    short = GOOD.replace("\n  name: shapes", " shapes")
    assert short != GOOD and recipe.load(write(short)) == recipe.load(write(GOOD))


def test_folders_are_recorded_so_that_they_are_found_from_elsewhere(write, tmp_path, monkeypatch):
    for name in ("photos", "val photos", "run"):
        Path(name).mkdir()
    Path("link").symlink_to("val photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = ["data={name: folder, root: photos, val_root: link/../link}", "init=~/run"]
    r = recipe.load(write(GOOD), folders)
    assert (r.data.root, r.data.val_root, r.init) == (
        *(str(Path(name).resolve()) for name in ("photos", "val photos", "run")),
    )
    assert recipe.load(write(GOOD), ["data.cache=new/cache"]).data.cache == str(Path("new/cache").resolve())
    assert recipe.load(write(GOOD), ["data.cache=none"]).data.cache == "none"
    # What is no folder is left as it was written.
    assert recipe.load(write(GOOD), ["data={name: folder, root: cifar}"]).data.root == "cifar"


def test_a_folder_with_a_name_that_is_not_utf8_can_be_recorded(write, tmp_path, monkeypatch):
    odd = Path(os.fsdecode(b"odd\xff"))
    (odd / "photos").mkdir(parents=True)
    monkeypatch.chdir(odd)
    r = recipe.load(write(GOOD), ["data={name: folder, root: photos}"])
    assert yaml.parse(r.dump()).value["data"]["root"] == "photos"


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


def test_base_is_relative_to_its_file(write):
    Path("deep").mkdir()
    write(GOOD, "deep/below.yaml")
    write("base: below.yaml\n", "deep/r.yaml")
    assert recipe.load("deep/r.yaml").train.epochs == 2
    assert "base: 'below.yaml': no such file" in load_error(write("base: below.yaml\n"))


def test_errors_name_the_file_of_the_value(write):
    write(GOOD.replace("epochs: 2", "epochs: x\n  lr: 0"), "below.yaml")
    assert load_errors(write("base: below.yaml\nseed: x\ntrain: {lr: 1}\n")) == [
        "r.yaml:2:1: seed: 'x' must be a valid integer",
        "below.yaml:8:3: train.epochs: 'x' must be a valid integer",
    ]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cyclic_bases(write, length):
    names = [f"{i}.yaml" for i in range(length)]
    for name, following in itertools.pairwise([*names, names[0]]):
        write(f"base: {following}\n", name)
    line = load_error(names[0])
    assert line.startswith(f"{names[-1]}:1:1: base: the bases form a cycle ({' → '.join([*names, names[0]])})")


def test_a_missing_base_does_not_hide_other_errors(write, ship):
    ship(csnet=GOOD)
    assert load_errors(write("base: csnt\ntrain: {lr: x}\n")) == [
        "r.yaml:1:1: base: 'csnt': no such file or shipped recipe; did you mean 'csnet'? shipped recipes: csnet",
        "r.yaml:2:9: train.lr: 'x' must be a valid number",
    ]
    assert "base: 3 is not a string" in load_error(write("base: 3"))
    assert "base: '\\x00'" in load_error(write('base: "\\0"'))
    assert load_error(write("base: below.yaml\n") and write("base: [", "below.yaml") and "r.yaml").startswith(
        "below.yaml:1:"
    )


# Finding


def test_shipped_recipes_are_found_by_name_and_can_be_bases(write, ship):
    package = ship(csnet=GOOD, other="base: csnet.yaml\nseed: 5\n")
    assert list(overrides.shipped_recipes()) == ["csnet", "other"]
    assert overrides.find_recipe("csnet") == overrides.find_recipe("csnet.yaml") == package / "csnet.yaml"
    assert recipe.load("other").seed == 5
    assert recipe.load(write("base: other\nname: mine\n")).seed == 5


def test_files_take_precedence_over_shipped_recipes_and_those_over_folders(write, ship):
    package = ship(csnet=GOOD)
    Path("csnet").mkdir()
    assert overrides.find_recipe("csnet") == package / "csnet.yaml"
    assert overrides.find_recipe(write(GOOD, "csnet.yaml")) == Path("csnet.yaml")


def test_a_missing_recipe(write, ship):
    ship(csnet=GOOD, other=GOOD)
    for name in ("csnt", "csnt.yaml", Path("recipes/csnt.yaml")):
        with pytest.raises(RecipeError, match=r"no such file.*did you mean 'csnet'\? shipped recipes: csnet, other$"):
            overrides.find_recipe(name)
    for name in ("", "x" * 5000, "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(RecipeError):
            overrides.find_recipe(name)


def test_a_folder_is_not_a_recipe(write):
    Path("runs").mkdir()
    with pytest.raises(RecipeError, match="runs: is a folder, not a recipe"):
        overrides.find_recipe("runs")
    write(GOOD, "runs/recipe.yaml")
    with pytest.raises(RecipeError, match=r"did you mean runs/recipe\.yaml\?"):
        overrides.find_recipe("runs")


def test_an_unreadable_file(write, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    write(GOOD)
    monkeypatch.setattr(Path, "open", refuse)  # The tests may run as root.
    assert load_error("r.yaml") == "r.yaml: cannot be read (Permission denied); fix its permissions or path"


def test_a_new_target_replaces_the_old_one(write):
    recipe = write(GOOD + "target: {params_ratio: 0.5}\n")
    assert overrides.load_tree(recipe, ["target.macs=1M"]).get(("target",)) == {"macs": "1M"}
    assert overrides.load_tree(recipe, ["target.params_ratio=0.2"]).get(("target",)) == {"params_ratio": 0.2}
    assert overrides.load_tree(recipe, ["target.macs=null"]).get(("target",)) == {"params_ratio": 0.5, "macs": None}
