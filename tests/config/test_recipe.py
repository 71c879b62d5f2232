# ruff: noqa: F401, F811 (fixtures are imported, and named again as arguments)
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.recipe_standins import GOOD, load_error, load_errors, registered, write
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.config import recipe, registry, yaml
from prunekit.config.overrides import find_recipe
from prunekit.config.schema import SparseTraining
from prunekit.errors import RecipeError

# Loaded recipes


def test_load_fills_in_defaults_of_schema_and_builders(write):
    r = recipe.load(write(GOOD))
    assert (r.name, r.seed, r.init, r.task) == ("toy run", 0, None, "saliency")
    assert r.backbone.options == {"width": 3, "depth": 2, "split": [0.5, 0.5], "mode": None}
    assert r.data == recipe.Data(name="shapes", options={"count": 10})
    assert (r.data.size, r.data.on_error) == (224, "raise")
    assert r.train == SparseTraining(
        epochs=2,
        optimizer=recipe.Component(name="adam", options={"rate": 0.5}),
        schedule=recipe.Component(name="constant"),
        augment=recipe.Component(name="none"),
    )
    assert (r.train.batch_size, r.train.lr, r.train.gate_lr, r.train.precision) == (16, 1e-3, None, "float32")
    assert r.train.checkpoint == recipe.Checkpoint(every=1, keep=2)
    assert r.decay == recipe.Decay(name="dynamic", weight=1e-2, options={"momentum": 0.0})
    assert r.slim == recipe.Slim(threshold=1e-3, exact=False, min_channels=1)
    assert r.finetune.epochs == 1 and r.export.onnx is True and r.log == "none"


def test_dump_writes_every_key_in_schema_order(write):
    lines = recipe.load(write(GOOD)).dump().splitlines()
    top = [line.partition(":")[0] for line in lines if line[0] != " "]
    assert top == list(recipe.Recipe.model_fields)
    assert "init: null" in lines and "  gate_lr: null" in lines
    assert lines[4:8] == ["backbone:", "  name: toy", "  file: null", "  options:"]


def test_integers_become_floats_where_the_schema_has_floats(write):
    dumped = recipe.load(write(GOOD), ["train.lr=1", "decay.options.momentum=1"]).dump()
    assert "  lr: 1.0\n" in dumped and "    momentum: 1.0\n" in dumped


def test_loads_without_torch(write):
    # In a subprocess, because other tests import torch.
    code = "import sys; sys.modules['torch'] = None; import prunekit.config.recipe, prunekit.training.schedules"
    subprocess.run([sys.executable, "-c", code], check=True)


paths = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
rates = st.floats(1e-300, 1e300)
names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\"), min_size=1, max_size=8)
functions = names.filter(lambda name: not name.startswith("__"))  # every module has a __dict__
plains = st.fixed_dictionaries(
    {"name": st.sampled_from(["adam", "sgd"]), "options": st.fixed_dictionaries({}, optional={"rate": rates})}
)
trainings = st.fixed_dictionaries(
    {"epochs": st.integers(0, 1000)},
    optional={
        "batch_size": st.integers(1, 1000),
        "optimizer": plains | st.sampled_from(["adam", "sgd"]),
        "lr": rates | st.integers(1, 9),
        "gate_lr": st.none() | rates,
        "schedule": st.sampled_from(["constant", "cosine", {"name": "cosine", "options": {"warmup": 0.1}}]),
        "precision": st.sampled_from(["float32", "bf16"]),
        "checkpoint": st.fixed_dictionaries(
            {},
            optional={
                "every": st.integers(1, 9),
                "steps": st.none() | st.integers(1, 99),
                "minutes": st.none() | st.floats(0.1, 99),
                "keep": st.integers(1, 9),
                "best": st.booleans(),
            },
        ),
    },
)
toys = st.fixed_dictionaries(
    {
        "name": st.just("toy"),
        "options": st.fixed_dictionaries(
            {"width": st.integers(-9, 9)},
            optional={
                "mode": st.none() | st.integers(0, 9) | st.sampled_from(["1e-4", "no", "~", ""]),
                "split": st.lists(rates, max_size=3),
            },
        ),
    }
)
from_files = st.fixed_dictionaries(
    {
        "name": functions,
        "file": st.just("net.py"),
        "options": st.dictionaries(names, st.none() | rates | names, max_size=3),
    }
)
datasets = st.fixed_dictionaries(
    {"name": st.just("shapes")}, optional={"size": st.integers(1, 999)}
) | st.fixed_dictionaries(
    {"name": st.just("folder"), "root": paths.filter(lambda path: path is not None)},
    optional={"val_root": paths, "val_holdout": st.floats(0.01, 0.99)},
)
trees = st.fixed_dictionaries(
    {
        "name": names.filter(lambda name: name not in (".", "..")),
        "backbone": toys | from_files,
        "data": datasets,
        "train": trainings,
        "finetune": trainings,
    },
    optional={
        "seed": st.integers(0, (1 << 32) - 1),
        "init": paths,
        "decay": st.fixed_dictionaries({}, optional={"name": st.just("l1"), "weight": rates}),
        "slim": st.fixed_dictionaries({}, optional={"threshold": rates, "exact": st.booleans()}),
        "export": st.fixed_dictionaries({}, optional={"onnx": st.booleans(), "int8": st.booleans()}),
        "log": st.sampled_from(["none", "tensorboard"]),
    },
)  # fmt: skip


@settings(max_examples=60)
@given(trees)
def test_dump_and_load_round_trip(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.with_name("net.py").write_text("def __getattr__(name):\n    return lambda **options: None\n")
    path.write_text(yaml.dump(tree), encoding="utf-8")
    first = recipe.load(path)
    path.write_text(first.dump(), encoding="utf-8")
    second = recipe.load(path)
    assert second == first and second.dump() == first.dump()


@settings(max_examples=60)
@given(
    st.binary(max_size=80) | st.text(max_size=80).map(lambda t: GOOD.encode() + t.encode("utf-8", "replace")),
    st.lists(st.text(max_size=20) | st.text(alphabet="name.=data{}[]:1 ", max_size=20), max_size=3),
)
def test_invalid_recipes_raise_errors_with_locations(tmp_path_factory, content, overrides):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    try:
        recipe.load(path, overrides)
    except RecipeError as error:
        for line in str(error).splitlines():
            assert line.startswith((f"{path}:", "override "))


@settings(max_examples=60)
@given(st.text(max_size=300))
def test_find_recipe_raises_only_recipe_errors(text):
    try:
        find_recipe(text)
    except RecipeError as error:
        assert "\n" not in str(error)


# Errors in values


def test_errors_of_both_passes_are_reported_together_in_order(write):
    text = """\
name: a/b
backbone: {name: toy, options: {widht: 3, depth: "2"}}
data: {name: shaps, size: many}
train:
  epocs: 3
  lr: .inf
  optimizer: adm
  checkpoint: {every: 0}
finetune: {epochs: 1}
export: {onnx: on}
"""
    starts = [line.split(": ")[:2] for line in load_errors(write(text), ["seed=true", "trian.lr=1"])]
    assert starts == [
        ["r.yaml:1:1", "name"],
        ["r.yaml:2:23", "backbone.options.width"],
        ["r.yaml:2:33", "backbone.options.widht"],
        ["r.yaml:2:43", "backbone.options.depth"],
        ["r.yaml:3:8", "data.name"],
        ["r.yaml:3:21", "data.size"],
        ["r.yaml:4:1", "train.epochs"],
        ["r.yaml:5:3", "train.epocs"],
        ["r.yaml:6:3", "train.lr"],
        ["r.yaml:7:3", "train.optimizer.name"],
        ["r.yaml:8:16", "train.checkpoint.every"],
        ["r.yaml:10:10", "export.onnx"],
        ["override 'seed=true'", "seed"],
        ["override 'trian.lr=1'", "trian"],
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=many", "train.epochs: 'many' must be a valid integer"),
        ("train.epochs=true", "train.epochs: true must be a valid integer"),
        ("train.epochs=1.5", "train.epochs: 1.5 must be a valid integer"),
        ("train.epochs=1e2", "train.epochs: 100.0 is not an integer; write 100"),
        ("train.epochs='3'", "train.epochs: '3' is a string; remove the quotes"),
        ("train.epochs=-1", "train.epochs: -1 must be greater than or equal to 0"),
        ("train.epochs=", "train.epochs: null must be a valid integer"),
        ("train.lr=fast", "train.lr: 'fast' must be a valid number"),
        ("train.lr=0", "train.lr: 0 must be greater than 0"),
        ("train.lr=.inf", "train.lr: '.inf' is not finite"),
        ("export.onnx=no", "export.onnx: 'no' must be a valid boolean"),
        ("name=12", "name: 12 must be a string; put it in quotes"),
        ("name=..", "name: '..' is not a folder name; write one"),
        ("name=''", "name: '' is not a folder name"),
        ("name=' x'", "name: ' x' has surrounding spaces"),
        ("seed=4294967296", "seed: 4294967296 must be less than 4294967296"),
        ("data.on_error=ignore", "data.on_error: 'ignore' must be 'raise' or 'skip'"),
        ("train=3", "train: 3 must be a mapping"),
        ("slim=", "slim: null must be a mapping"),
        ("decay=[l1]", "decay: ['l1'] is not a mapping; set decay.name instead"),
        ("train.optimizer=[a]", "train.optimizer: ['a'] is not a mapping; set train.optimizer.name instead"),
        ("train.epocs=1", "train.epocs: unknown key, did you mean 'train.epochs'?"),
        ("weight=1", "weight: unknown key here; use decay.weight"),
        ("qqq=1", "qqq: unknown key; remove it, known keys: name, seed"),
        ("device=cuda", "device: unknown key; the device is chosen automatically, a GPU where there is one; choose"),
        ("train.Device=cuda", "train.Device: unknown key; the device is chosen automatically"),
        ("imgsz=64", "imgsz: unknown key; use data.size"),
        ("output_dir=x", "output_dir: unknown key; use the option --out DIR"),
        ("data.size=[64, 48]", "[64, 48]: images are resized to squares only; write one number, such as 64"),
        ("data.size=48x64", "'48x64': images are resized to squares only; write one number, such as 64"),
        ("data.size='64'", "data.size: '64' is a string; remove the quotes"),
        ("task=segmentation", "unknown task 'segmentation'; known: saliency; a task of your own: register_task"),
        ("train.optimizer.lr=1", "train.optimizer.lr: unknown key here; use train.lr"),
        ("task=salience", "task: unknown task 'salience', did you mean 'saliency'?"),
        ("decay.name=l2", "decay.name: unknown decay 'l2'; known: dynamic, l1, "),
        ("finetune.schedule=cos", "finetune.schedule.name: unknown schedule 'cos', did you mean 'cosine'?"),
        (
            "decay.options.momentun=1",
            "momentun: decay 'dynamic' has no such option, did you mean 'momentum'? known options: mom",
        ),
        (
            "decay.options.weight=1",
            "decay.options.weight: decay 'dynamic' has no such option; write it as decay.weight",
        ),
        ("decay.options.momentum=x", "decay.options.momentum: 'x' must be a valid number"),
        ("decay.options=[1]", "decay.options: [1] must be a mapping"),
        ("backbone.options.split=[1, x]", "backbone.options.split[1]: 'x' must be a valid number"),
        ("backbone.options.mode=[]", "backbone.options.mode: [] must be a valid integer or must be a string"),
        (
            "data.root=/x",
            "data.root: data set 'shapes' takes no root; remove it (data.root=null) or use a data set that reads "
            "folders (folder, image_folder)",
        ),
        ("data.val_holdout=0.1", "data.val_holdout: data set 'shapes' takes no val_holdout; remove it"),
        ("data.name=folder", "data.root: data set 'folder' reads a folder; set data.root=FOLDER"),
        (
            "decay.name=misfit",
            "decay.options.power: the default of decay 'misfit' is wrong: 'much' must be a valid number; set another",
        ),
        ("decay.name=unwritable", "decay.options: a default of decay 'unwritable' cannot be written as YAML"),
        ("decay.name=unresolved", "the signature of decay 'unresolved' cannot be read (NameError"),
    ],
)
def test_error_names_key_problem_and_fix(write, override, words):
    line = load_error(write(GOOD), [override])
    assert words in line
    assert line.startswith((f"override {override!r}: ", f'override "{override}": ', "r.yaml:"))


def test_integer_bounds_are_written_without_decimals(write):
    assert "override 'data.val_holdout=1': data.val_holdout: 1 must be less than 1" in load_errors(
        write(GOOD), ["data.val_holdout=1"]
    )


def test_builder_with_keyword_arguments_takes_any_option(write):
    given = ["decay.name=l1", "decay.options.extra=3", "decay.options.power=2"]
    assert recipe.load(write(GOOD), given).decay.options == {"power": 2.0, "limit": None, "extra": 3}


def test_options_without_a_name_belong_to_the_default_name(write):
    r = recipe.load(write(GOOD), ["train.optimizer.options.rate=1", "decay.options.momentum=2"])
    assert r.train.optimizer == recipe.Component(name="adam", options={"rate": 1.0})
    assert r.decay == recipe.Decay(name="dynamic", options={"momentum": 2.0})


def test_missing_keys_are_reported_at_their_section(write):
    assert load_errors(write("name: x\n\ndata:\n  size: 3\n")) == [
        "r.yaml:1:1: backbone: is missing; add the section with name",
        "r.yaml:1:1: train: is missing; add the section with epochs",
        "r.yaml:1:1: finetune: is missing; add the section with epochs",
        "r.yaml:3:1: data.name: is missing; add 'name: …'",
    ]
    assert load_error(write(GOOD.replace("{width: 3}", "{}"))) == (
        "r.yaml:4:3: backbone.options.width: is missing; backbone 'toy' requires it, add 'width: …'"
    )


def test_an_unreadable_value_is_one_error(write):
    assert len(load_errors(write(GOOD.replace("epochs: 2", "epochs: !!python/name:os.system")))) == 1


def test_syntax_and_value_errors_are_reported_together(write):
    assert [line.split(": ")[0] for line in load_errors(write(GOOD + "seed: x\nseed: 1\ntask: 3\n1: 2\n"))] == [
        "r.yaml:12:1",
        "r.yaml:13:1",
        "r.yaml:14:1",
    ]


def test_failed_plugins_are_reported_in_one_line(write, monkeypatch):
    monkeypatch.setattr(registry._plugins, "failures", [RecipeError("plugin 'p' failed:\n  boom")])
    assert "plugin 'p' failed: boom" in load_error(write(GOOD), ["decay.name=l2"])


def test_backbone_from_a_file(write):
    write("def build(x: list[int], y: float = 2.0): ...", "net.py")
    r = recipe.load(write(GOOD), ["backbone.file=net.py", "backbone.name=build", "backbone.options={x: [1]}"])
    assert r.backbone.file.startswith(f"{Path('net.py').resolve()}#sha256=")
    assert (r.backbone.name, r.backbone.options) == ("build", {"x": [1], "y": 2.0})
    assert "backbone.name: 3 must be a string" in load_error("r.yaml", ["backbone.file=net.py", "backbone.name=3"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "r.yaml:1:1: a recipe consists of 'key: value' lines, it is empty"),
        (b"- 1", "r.yaml:1:1: a recipe consists of 'key: value' lines, this is [1]"),
        (b"a: \xff", "r.yaml:1:4: byte 0xff is not UTF-8"),
        (b"a: [", "r.yaml:1:5: invalid YAML"),
        (b"a: 1\n---\n", "r.yaml:2:1: a second document"),
    ],
)
def test_files_that_are_not_recipes(write, content, words):
    assert load_error(write(content)).startswith(words)
