from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest

import prunekit
from prunekit.config import registry
from prunekit.errors import PluginError, PrunekitWarning, RecipeError


class Point:
    """Stub of importlib.metadata.EntryPoint."""

    def __init__(self, name, dist, load):
        self.name, self.value, self.load = name, f"{name}.module", load
        self.dist = SimpleNamespace(name=dist, version="1.2") if dist else None


@pytest.fixture
def install(monkeypatch):
    """install(*points): replace the installed plugins, none of them loaded, and clear the registries."""
    monkeypatch.setattr(registry, "_plugins", registry._Plugins())
    for table in (registry.backbones, registry.decays):
        monkeypatch.setattr(table, "_entries", {})
        monkeypatch.setattr(table, "_families", {})

    def with_points(*points):
        def entry_points(*, group):
            assert group == "prunekit.plugins"
            return points

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    with_points()
    return with_points


def builder(summary):
    def build(width: int = 4):
        raise AssertionError("looking up builds nothing")

    build.__doc__ = summary
    build.__qualname__ = summary
    return build


def registers(name, summary):
    return lambda: registry.register_backbone(name)(builder(summary))


def fails(error):
    def load():
        raise error

    return load


def test_plugins_load_once_at_the_first_lookup(install):
    loads = []
    install(Point("ours", "prunekit", lambda: loads.append(1)))
    assert not loads
    assert registry.backbones.names() == [] and "x" not in registry.decays
    assert loads == [1]


def test_a_failing_plugin_does_not_stop_the_others(install):
    install(
        Point("broken", "bad-dist", fails(ImportError("no module named foo"))),
        Point("fine", "good-dist", registers("fine", "A fine net.")),
    )
    with pytest.warns(PrunekitWarning, match="'broken' of bad-dist failed to load"):
        entry = registry.backbones.entry("fine")
    assert (entry.origin, entry.version, entry.summary) == ("good-dist", "1.2", "A fine net.")
    (failure,) = registry.plugin_failures()
    assert isinstance(failure, PluginError)
    for words in ("'broken'", "bad-dist", "ImportError: no module named foo", "pip uninstall bad-dist"):
        assert words in str(failure)
    with pytest.raises(RecipeError, match="not loaded: plugin 'broken' of bad-dist"):
        registry.backbones.get("missing")


def test_plugin_failures_does_not_warn(install, recwarn):
    install(Point("broken", "bad-dist", fails(ImportError("no module named foo"))))
    assert len(registry.plugin_failures()) == 1
    registry.backbones.names()
    assert not recwarn


@pytest.mark.parametrize("error", [SystemExit(3), SyntaxError("invalid"), RuntimeError("first\nsecond"), KeyError("x")])
def test_any_plugin_error_is_one_line(install, error):
    install(Point("broken", "bad-dist", fails(error)), Point("fine", "good-dist", registers("fine", "A fine net.")))
    (failure,) = registry.plugin_failures()
    assert "\n" not in str(failure) and "bad-dist" in str(failure) and type(error).__name__ in str(failure)
    assert registry.backbones.names() == ["fine"]


@pytest.mark.filterwarnings("error::prunekit.errors.PrunekitWarning")
def test_all_plugins_load_when_warnings_are_errors(install):
    install(
        Point("broken", "bad-dist", fails(KeyError())), Point("fine", "good-dist", registers("fine", "A fine net."))
    )
    with pytest.raises(PrunekitWarning):
        registry.backbones.names()
    assert registry.backbones.names() == ["fine"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_plugin_cannot_replace_a_builtin_name(install, order):
    points = [
        Point("a", "greedy", registers("csnet", "Another.")),
        Point("z", "prunekit", registers("csnet", "The real one.")),
    ]
    install(*points[::order])
    with pytest.warns(PrunekitWarning, match="already registered"):
        assert registry.backbones.entry("csnet").summary == "The real one."
    (failure,) = registry.plugin_failures()
    assert "'csnet' of greedy is already registered by prunekit" in str(failure)


def test_a_module_may_be_imported_twice(install):
    build = builder("A net.")
    registry.register_backbone("net")(build)
    assert registry.register_backbone("net")(build) is build
    with pytest.raises(PluginError, match="already registered"):
        registry.register_backbone("net")(builder("Another net."))


def test_a_plugin_may_look_up_names_while_loading(install):
    install(Point("curious", "curious-dist", lambda: registry.decays.names()))
    assert registry.backbones.names() == []
    assert registry.plugin_failures() == []


@pytest.mark.parametrize("name", [None, "", builder])
def test_register_without_a_name_is_rejected(install, name):
    with pytest.raises(PluginError, match=r"a backbone needs a name: write @register_…\("):
        registry.register_backbone(name)


def test_register_family(install):
    @registry.backbones.register_family("lib")
    def find(name):
        """Any model of lib."""
        if name != "a/b":
            raise RecipeError("lib has no such model")
        return registry.Entry(f"lib/{name}", builder("A net."), "lib", "3.0")

    registry.register_backbone("lib/own")(builder("Ours."))
    assert registry.backbones.entry("lib/a/b").version == "3.0"
    assert registry.backbones.entry("lib/own").summary == "Ours."
    with pytest.raises(RecipeError, match="lib has no such model"):
        registry.backbones.get("lib/c")
    (family,) = registry.backbones.families()
    assert (family.prefix, family.summary) == ("lib", "Any model of lib.")
    message = registry.backbones.unknown("lbi/x")
    assert message == "unknown backbone 'lbi/x', did you mean 'lib/x'? known: lib/own, lib/…"
    assert registry.decays.families() == []


def test_unknown_name_message(install):
    for name in ("csnet", "resnet"):
        registry.register_backbone(name)(builder(name))
    with pytest.raises(RecipeError, match=r"^unknown backbone 'csnt', did you mean 'csnet'\? known: csnet, resnet$"):
        registry.backbones.get("csnt")
    assert registry.backbones.unknown("zzz") == "unknown backbone 'zzz'; known: csnet, resnet"
    assert registry.decays.unknown("l1") == "unknown decay 'l1'; known: none"


def test_options_exclude_supplied_parameters_and_resolve_annotations(install):
    @registry.register_decay("l1")
    def l1(model, groups, weight: float, /, *, power: int | None = None, shares: tuple[float, ...] = (1.0,)):
        """L1."""

    assert isinstance(l1.__annotations__["power"], str)  # Postponed, or the test proves nothing.
    options = registry.decays.options("l1")
    assert list(options) == ["power", "shares"]
    assert options["power"].annotation == int | None
    assert options["shares"].annotation == tuple[float, ...]
    assert options["shares"].default == (1.0,)
    assert options["power"].kind is inspect.Parameter.KEYWORD_ONLY


def test_iteration_is_sorted_by_name(install):
    for name in ("b", "a"):
        registry.register_backbone(name)(builder(name))
    assert [entry.name for entry in registry.backbones] == ["a", "b"]


def test_origin_of_a_module_imported_before_the_plugins():
    code = (
        "import prunekit.backbones.resnet; from prunekit.config import registry; "
        "entry = registry.backbones.entry('resnet'); print(entry.origin, entry.version)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["prunekit", prunekit.__version__]
