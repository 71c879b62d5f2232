from types import SimpleNamespace

import pytest
from rich.console import Console

from prunekit.cli import main
from prunekit.commands.list import REGISTRIES, recipe_summary, table
from prunekit.config import registry
from prunekit.config.overrides import shipped_recipes


def shown():
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(table())
    return capture.get()


def theirs(a, *, width: int = 4, rate=0.25, names: tuple[str, ...] = ("x", "y"), on=True, mode=None, **others):
    """A net [red]with[/red] brackets."""


def broken(width=4):
    """Its annotation is undefined."""


broken.__annotations__["width"] = "Nowhere"


@pytest.fixture
def plugin(monkeypatch):
    registry.backbones.names()
    entries = {
        **registry.backbones._entries,
        "theirs[x]": registry.Entry("theirs[x]", theirs, "their-nets", "2.0"),
        "broken": registry.Entry("broken", broken, "a.module.of.somebody"),
    }
    monkeypatch.setattr(registry.backbones, "_entries", entries)


def test_every_name_is_listed_with_its_origin():
    text = shown()
    assert max(map(len, text.splitlines())) <= 80
    sections = {}
    for line in text.splitlines()[1:]:
        if not line.startswith(" "):
            inside = sections.setdefault(line.strip(), [])
        elif line[2:3].strip():
            inside.append(line.split()[0:2])
    for kind in REGISTRIES:
        names = getattr(registry, kind)
        for name in names.names():
            assert [name, "prunekit"] in sections[names.kind], name
    assert [name for name, _ in sections["recipe"]] == list(shipped_recipes())
    for path in shipped_recipes().values():
        assert recipe_summary(path) in " ".join(text.split())


def test_options_are_written_as_in_a_recipe(plugin):
    text = " ".join(shown().split())
    options = "a, width=4, rate=0.25, names=[x, y], on=true, mode=null, …"
    assert f"theirs[x] their-nets 2.0 A net [red]with[/red] brackets. {options}" in text


def test_unreadable_signature(plugin):
    assert "options cannot be read (NameError: name 'Nowhere' is not defined)" in " ".join(shown().split())


def test_libraries_that_are_not_installed(monkeypatch):
    import importlib.metadata

    def version(name):
        if name == "timm":
            return "1.0.9"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    text = " ".join(shown().split())
    assert "timm/… timm 1.0.9 Any model of timm" in text and "torchvision/… not installed" in text


def test_plugin_failures_are_printed_once(monkeypatch, capsys):
    def fail():
        raise ImportError("no module named foo")

    plugins = registry._Plugins()
    point = SimpleNamespace(name="bad", value="bad", load=fail, dist=SimpleNamespace(name="bad-dist", version="1.0"))
    monkeypatch.setattr(registry, "_plugins", plugins)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [point])
    with pytest.raises(SystemExit) as stop:
        main(["list"])
    seen = capsys.readouterr()
    assert stop.value.code == 0 and "csnet" in seen.out
    assert seen.err.count("\n") == 1
    assert seen.err.startswith("prunekit: plugin 'bad' of bad-dist failed to load (ImportError: no module named foo)")
