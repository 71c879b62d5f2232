"""Building a model from the name in a recipe, and the errors."""

import json
from pathlib import Path

import pytest
from torch import nn

from prunekit.backbones import build
from prunekit.cli import main
from prunekit.config import recipe, registry
from prunekit.errors import PluginError, PrunekitError, PrunekitWarning, RecipeError

FILE = """
from torch import nn

def build(width: int = 4, depth: int = 1):
    return nn.Sequential(*[nn.Conv2d(3, width, 1) for _ in range(depth)])
"""
RECIPE = """
name: mine
backbone: {file: nets/net.py, name: build, options: {width: 5}}
data: salient_shapes
train: {epochs: 1}
finetune: {epochs: 1}
""".replace("data: salient_shapes", "data: {name: salient_shapes}")


@pytest.fixture
def plugin(monkeypatch):
    """plugin(builder): registered as "theirs" by the distribution their-nets."""

    def register(function):
        registry.backbones.names()
        entries = {**registry.backbones._entries, "theirs": registry.Entry("theirs", function, "their-nets", "2.0")}
        monkeypatch.setattr(registry.backbones, "_entries", entries)

    return register


def fails(error):
    def function(width: int = 4):
        raise error

    return function


def test_builder_must_return_a_module(plugin):
    plugin(lambda: 3)
    with pytest.raises(PluginError, match=r"'theirs' of their-nets returned int, not a torch\.nn\.Module"):
        build("theirs")


@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), KeyError("x"), AssertionError(), TypeError("add")])
def test_builder_error_names_builder_and_distribution(plugin, error):
    plugin(fails(error))
    with pytest.raises(PluginError) as caught:
        build("theirs", {"width": 7})
    message = str(caught.value)
    assert "\n" not in message
    for word in ("'theirs' of their-nets", "{'width': 7}", type(error).__name__):
        assert word in message


@pytest.mark.parametrize(
    ("function", "options", "word"),
    [(fails(ValueError("too thin")), {}, "too thin"), (fails(ValueError()), {"wdth": 3}, "unexpected keyword.*wdth")],
)
def test_rejected_builder_options_raise_recipe_error(plugin, function, options, word):
    plugin(function)
    with pytest.raises(RecipeError, match=f"^backbone.options: theirs of their-nets: .*{word}"):
        build("theirs", options)


def test_prunekit_errors_pass_through_unchanged(plugin):
    plugin(fails(PrunekitError("as it stands")))
    with pytest.raises(PrunekitError, match=r"^as it stands$"):
        build("theirs")


@pytest.fixture
def file_recipe(tmp_path, monkeypatch):
    """A recipe in a folder that is not the current one, with its file beside it."""
    (tmp_path / "project" / "nets").mkdir(parents=True)
    (tmp_path / "project" / "nets" / "net.py").write_text(FILE)
    (tmp_path / "project" / "mine.yaml").write_text(RECIPE)
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "project" / "mine.yaml"


def test_file_is_relative_to_recipe_and_its_options_are_checked(file_recipe):
    loaded = recipe.load(file_recipe).backbone
    assert loaded.options == {"width": 5, "depth": 1}
    model = build(loaded.name, loaded.options, loaded.file)
    assert isinstance(model, nn.Sequential) and model[0].out_channels == 5
    with pytest.raises(RecipeError, match=r"backbone 'build' of net\.py has no such option, did you mean 'width'"):
        recipe.load(file_recipe, ["backbone.options.widht=3"])
    with pytest.raises(RecipeError, match=r"mine\.yaml:3:\d+: backbone\.file: .*has no function 'biuld'"):
        Path(file_recipe).write_text(RECIPE.replace("name: build", "name: biuld"))
        recipe.load(file_recipe)


def test_file_of_base_recipe_is_relative_to_base(file_recipe):
    Path("derived.yaml").write_text("base: ../project/mine.yaml\nname: other\n")
    assert recipe.load("derived.yaml").backbone == recipe.load(file_recipe).backbone


def test_file_in_override_is_relative_to_current_folder(file_recipe):
    Path("sub").mkdir()
    Path("sub/here.py").write_text(FILE)
    loaded = recipe.load(file_recipe, ["backbone.file=sub/here.py"])
    assert loaded.backbone.file.startswith(f"{Path('sub/here.py').resolve()}#sha256=")
    with pytest.raises(
        RecipeError, match=r"override 'backbone\.file=gone\.py': backbone\.file: .*cwd/gone\.py does not exist"
    ):
        recipe.load(file_recipe, ["backbone.file=gone.py"])


def test_changed_file_is_detected(file_recipe):
    first = recipe.load(file_recipe)
    Path("resolved.yaml").write_text(first.dump())
    assert recipe.load("resolved.yaml") == first
    net = file_recipe.parent / "nets" / "net.py"
    net.write_text(f"{FILE}\n# another thought")
    with pytest.raises(RecipeError, match=r"has changed .*restore that version"):
        recipe.load("resolved.yaml")
    # The way on that it proposes.
    second = recipe.load("resolved.yaml", [f"backbone.file={net}"])
    assert second.backbone.file != first.backbone.file and second.backbone.options == first.backbone.options
    with pytest.warns(PrunekitWarning, match=r"has changed "):
        build("build", {}, first.backbone.file)


def test_missing_file_error_names_the_key(tmp_path):
    with pytest.raises(RecipeError, match=r"^backbone\.file: .*gone\.py does not exist"):
        build("build", file=str(tmp_path / "gone.py"))


def test_run_finds_its_file_from_any_folder_and_detects_changes(file_recipe, tmp_path, monkeypatch, capsys):
    net = file_recipe.parent / "nets" / "net.py"
    net.write_text(
        "from torch import nn\n\ndef build(width: int = 4):\n"
        "    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())\n"
        "    return nn.Sequential(stem, nn.Conv2d(width, 1, 1))\n"
    )
    tiny = ["data.size=16", "data.options={train: 4, val: 2}", "train.epochs=0", "finetune.epochs=0"]

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code, capsys.readouterr()

    assert call("run", file_recipe, *tiny, "--out", "run")[0] == 0
    run = tmp_path / "cwd" / "run"
    noted = recipe.load(run / "recipe.yaml").backbone.file
    assert json.loads((run / "slim/plan.json").read_text())["builder"]["file"] == noted
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, said = call("slim", run, "slim.threshold=0.1", "--out", "again")
    assert status == 0, said.err
    status, said = call("groups", run)
    assert status == 0 and not said.err
    net.write_text(net.read_text().replace("ReLU", "SiLU"))
    status, said = call("groups", run)
    assert status == 2 and "has changed" in said.err and "--trust" in said.err
    status, said = call("groups", run, "--trust")
    assert status == 0 and said.err.startswith("prunekit: backbone.file: ") and "has changed" in said.err
    status, said = call("slim", run, "--out", "more")
    assert status == 2 and "restore that version" in said.err
    status, said = call("run", file_recipe, *tiny, "--out", run, "--resume")
    assert status == 2 and "was started with another recipe" in said.err and f"-  file: {noted}" in said.err
    net.unlink()
    status, said = call("groups", run)
    assert status == 2 and f"{net} does not exist" in said.err
