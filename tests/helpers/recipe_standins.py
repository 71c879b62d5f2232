"""Stub builders and fixtures for the recipe tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.config import overrides, recipe, registry
from prunekit.errors import RecipeError

GOOD = """\
name: toy run
backbone:
  name: toy
  options: {width: 3}
data:
  name: shapes
train:
  epochs: 2
finetune:
  epochs: 1
"""


def toy(width: int, *, depth: int = 2, split: tuple[float, ...] = (0.5, 0.5), mode: int | str | None = None):
    """Stub backbone."""


def shapes(split, *, size, seed, count: int = 10):
    """A data set without a folder."""


def folder(split, root, *, size, val_root=None, val_holdout=None, copy: bool = False):
    """A data set in a folder."""


def dynamic(model, groups, weight, *, momentum: float = 0):
    """The default is an integer, the annotation a float."""


def l1(model, groups, weight, *, power: float = 1.0, limit: float = None, **others):  # noqa: RUF013
    """Takes any further option; the default None is not in the annotation."""


def misfit(model, groups, weight, *, power: float = "much"):
    """The default does not fit the annotation."""


def unwritable(model, groups, weight, *, power=object()):  # noqa: B008
    """The default cannot be written as YAML."""


def unresolved(model, groups, weight, *, power: Nowhere = 1):  # noqa: F821
    """The annotation is not defined."""


def plain(*, rate: float = 0.5):
    """Stub of any other builder."""


def cosine(progress, *, warmup: float = 0.0):
    """Stub schedule."""


@pytest.fixture(scope="module", autouse=True)  # For the modules that import it.
def registered():
    """Replace all registered builders by stubs; none of the real ones is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_plugins", registry._Plugins())
        patch.setattr(registry._plugins, "loaded", True)
        for table, builders in {
            registry.backbones: {"toy": toy},
            registry.datasets: {"shapes": shapes, "folder": folder},
            registry.tasks: {"saliency": plain},
            registry.decays: {
                "dynamic": dynamic, "l1": l1, "misfit": misfit, "unwritable": unwritable, "unresolved": unresolved
            },
            registry.importances: {"gate": lambda model, groups, losses=None: {}},
            registry.optimizers: {"adam": plain, "sgd": plain},
            registry.schedules: {"constant": lambda progress: 1.0, "cosine": cosine},
            registry.augmentations: {"none": lambda images, targets, sizes, generator: None},
            registry.losses: {"task": lambda task: None},
        }.items():  # fmt: skip
            patch.setattr(table, "_families", {})
            patch.setattr(table, "_entries", {name: registry.Entry(name, b, "test") for name, b in builders.items()})
        yield


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text, name): write a file in the current folder, which is otherwise empty; return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="r.yaml"):
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """ship(**texts): replace the shipped recipes."""
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(overrides.importlib.resources, "files", lambda name: {"prunekit.recipes": package}[name])

    def ship(**texts):
        for name, text in texts.items():
            (package / f"{name}.yaml").write_text(text)
        (package / "README.md").write_text("no recipe")
        return package

    return ship


def load_errors(*args):
    with pytest.raises(RecipeError) as caught:
        recipe.load(*args)
    return str(caught.value).split("\n")


def load_error(*args):
    (line,) = load_errors(*args)
    return line
