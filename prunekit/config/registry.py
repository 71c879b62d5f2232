"""Registries of builders: backbones, data sets, tasks, decays and everything else that a recipe names.

Each entry point of the group ``prunekit.plugins`` names a module whose import registers builders, at the first lookup.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from prunekit.errors import PluginError, PrunekitError, PrunekitWarning, RecipeError
from prunekit.utils.io import is_out_of_memory
from prunekit.utils.text import one_line, suggest

ENTRY_POINT_GROUP = "prunekit.plugins"


@dataclass(frozen=True)
class Entry:
    """One registered builder; ``origin`` is the distribution that provides it, or else its module."""

    name: str
    build: Callable[..., Any]
    origin: str
    version: str | None = None  # of the distribution

    @property
    def summary(self) -> str:
        return _summary(self.build)


@dataclass(frozen=True)
class Family:
    """The models of another library, named PREFIX/NAME; ``find`` returns the entry of NAME or raises."""

    prefix: str
    find: Callable[[str], Entry]

    @property
    def summary(self) -> str:
        return _summary(self.find)


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


_registries: list[Registry] = []


class Registry:
    """Builders of one kind.

    Args:
        kind: name of the kind in messages.
        supplied: parameters of a builder that prunekit passes; all others are ``options`` in a recipe.
    """

    def __init__(self, kind: str, supplied: tuple[str, ...] = ()):
        self.kind = kind
        self.supplied = supplied
        self._entries: dict[str, Entry] = {}
        self._families: dict[str, Family] = {}
        _registries.append(self)

    def register(self, name: str) -> Callable[[Callable], Callable]:
        """Return a decorator that registers a builder as ``name``.

        Raises:
            PluginError: the name is taken by another builder, or is not a non-empty string.
        """
        if not (isinstance(name, str) and name):
            given = getattr(name, "__name__", name)
            raise PluginError(f"a {self.kind} needs a name: write @register_…({given!r}), not @register_… alone")

        def decorator(build: Callable) -> Callable:
            origin = _plugins.loading or build.__module__
            old = self._entries.get(name)
            if old is not None and _qualified_name(old.build) != _qualified_name(build):
                raise PluginError(
                    f"{self.kind} {name!r} of {origin} is already registered by {old.origin}; use another name"
                )
            self._entries[name] = Entry(name, build, origin, _plugins.version)
            return build

        return decorator

    def set_origin(self, module: str, origin: str, version: str | None) -> None:
        """Set the origin of the builders of a module that was imported before the entry points were loaded."""
        for name, entry in self._entries.items():
            if entry.origin == entry.build.__module__ == module:
                self._entries[name] = replace(entry, origin=origin, version=version)

    def register_family(self, prefix: str) -> Callable[[Callable[[str], Entry]], Callable[[str], Entry]]:
        """Return a decorator that registers a function which finds the entries named ``prefix/…``."""

        def decorator(find: Callable[[str], Entry]) -> Callable[[str], Entry]:
            self._families[prefix] = Family(prefix, find)
            return find

        return decorator

    def entry(self, name: str) -> Entry:
        """Return the entry of this name.

        Raises:
            RecipeError: the name is unknown; the message lists the known ones and the plugins that failed to load.
            PluginError: the library of a family is not installed, or does not import.
        """
        _plugins.load()
        prefix, slash, rest = name.partition("/")
        if name not in self._entries and slash and prefix in self._families:
            return self._families[prefix].find(rest)
        if name not in self._entries:
            raise RecipeError(self.unknown(name))
        return self._entries[name]

    def get(self, name: str) -> Callable[..., Any]:
        """Return the builder of this name; errors as in :meth:`entry`."""
        return self.entry(name).build

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the parameters of a registered builder that a recipe may set."""
        return self.options_of(self.get(name))

    def options_of(self, build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
        """Return the parameters of a builder that a recipe may set."""
        # eval_str: postponed annotations are strings, but the options are checked against types.
        parameters = inspect.signature(build, eval_str=True).parameters
        return {key: p for key, p in parameters.items() if key not in self.supplied and p.kind != p.POSITIONAL_ONLY}

    def unknown(self, name: str) -> str:
        prefixes = [family.prefix for family in self.families()]
        hint = suggest(name, [*self.names(), *(f"{prefix}/{name.partition('/')[2]}" for prefix in prefixes)])
        known = ", ".join([*self.names(), *(f"{prefix}/…" for prefix in prefixes)]) or "none"
        failures = "; ".join(map(str, _plugins.failures))
        return f"unknown {self.kind} {name!r}{hint} known: {known}" + (f" (not loaded: {failures})" if failures else "")

    def names(self) -> list[str]:
        _plugins.load()
        return sorted(self._entries)

    def families(self) -> list[Family]:
        _plugins.load()
        return [self._families[prefix] for prefix in sorted(self._families)]

    def __contains__(self, name: str) -> bool:
        _plugins.load()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._entries[name] for name in self.names()])


def _qualified_name(build: Callable[..., Any]) -> tuple[str, str]:
    return build.__module__, build.__qualname__


class _Plugins:
    """Loads the entry points once; a plugin that fails is recorded and does not stop the others."""

    def __init__(self) -> None:
        self.loaded = False
        self.loading: str | None = None
        self.version: str | None = None
        self.failures: list[PluginError] = []

    def load(self, warn: bool = True) -> None:
        if self.loaded:
            return
        # Set first: a plugin may look up a name while it is imported.
        self.loaded = True
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        # prunekit's own first, so that a plugin cannot take one of its names.
        for point in sorted(points, key=lambda p: (p.dist is None or p.dist.name != "prunekit", p.name, p.value)):
            self.loading = point.dist.name if point.dist else point.value
            self.version = point.dist.version if point.dist else None
            try:
                point.load()
                for registry in _registries:
                    registry.set_origin(point.value.partition(":")[0], self.loading, self.version)
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    raise
                message = f"plugin {point.name!r} of {self.loading} failed to load ({describe_error(error)})"
                self.failures.append(
                    PluginError(f"{message}; fix it, or uninstall it with: pip uninstall {self.loading}")
                )
            finally:
                self.loading = self.version = None
        for failure in self.failures if warn else ():
            warnings.warn(str(failure), PrunekitWarning, stacklevel=3)


def plugin_failures() -> list[PluginError]:
    """Return the plugins that failed to load, without a warning."""
    _plugins.load(warn=False)
    return list(_plugins.failures)


def describe_error(error: BaseException) -> str:
    """Return an error in one line: prunekit's own as they are, others with their type."""
    text = one_line(str(error))
    return text if isinstance(error, PrunekitError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def takes_any_option(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def accepted(build: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Return those of these names that a builder takes as arguments."""
    parameters = inspect.signature(build).parameters
    return [name for name in names if name in parameters or takes_any_option(parameters)]


def required_parameters(build: Callable[..., Any]) -> list[str]:
    """Return the names of a builder's parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(build).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]


_plugins = _Plugins()
backbones = Registry("backbone")
datasets = Registry("data set", ("split", "root", "val_root", "val_holdout", "size", "seed", "on_error"))
tasks = Registry("task")
decays = Registry("decay", ("model", "groups", "weight"))
importances = Registry("importance", ("model", "groups", "losses"))
optimizers = Registry("optimizer", ("groups",))
schedules = Registry("schedule", ("progress",))
augmentations = Registry("augmentation", ("images", "targets", "sizes", "generator"))
losses = Registry("loss", ("task",))

register_backbone = backbones.register
register_dataset = datasets.register
register_task = tasks.register
register_decay = decays.register
register_importance = importances.register
register_optimizer = optimizers.register
register_schedule = schedules.register
register_augmentation = augmentations.register
register_loss = losses.register
