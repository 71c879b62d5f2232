"""Names → builders, for backbones, data sets, tasks, decays and whatever else a recipe names.

Everything registered, the package's own included, comes in through the entry-point group ``prunekit.plugins``: each
entry point names a module whose import registers something. They are loaded at the first look-up, so that importing
prunekit costs nothing, and this module imports nothing above it.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prunekit.errors import PluginError, PrunekitError, PrunekitWarning, RecipeError

ENTRY_POINT_GROUP = "prunekit.plugins"


@dataclass(frozen=True)
class Entry:
    """One registered builder, the distribution that brought it (else the module), and that one's version."""

    name: str
    build: Callable[..., Any]
    origin: str
    version: str | None = None

    @property
    def summary(self) -> str:
        """The first line of the builder's docstring."""
        return (self.build.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class Family:
    """The models of another library, named PREFIX/NAME; ``find`` gives the entry of NAME, or raises."""

    prefix: str
    find: Callable[[str], Entry]

    @property
    def summary(self) -> str:
        """The first line of the docstring of ``find``."""
        return (self.find.__doc__ or "").strip().partition("\n")[0]


_tables: list[Registry] = []


class Registry:
    """A table of builders of one kind.

    Args:
        kind: the word that its errors use.
        supplied: parameters of a builder that prunekit fills in; all its others are the ``options`` of a recipe.
    """

    def __init__(self, kind: str, supplied: tuple[str, ...] = ()):
        self.kind = kind
        self.supplied = supplied
        self._entries: dict[str, Entry] = {}
        self._families: dict[str, Family] = {}
        _tables.append(self)

    def register(self, name: str) -> Callable[[Callable], Callable]:
        """Decorator: make ``name`` stand for the decorated builder.

        Raises:
            PluginError: the name is taken by another builder, or is none.
        """
        if not (isinstance(name, str) and name):
            word = getattr(name, "__name__", name)
            raise PluginError(f"a {self.kind} needs a name: write @register_…({word!r}), not @register_… alone")

        def keep(build: Callable) -> Callable:
            held = self._entries.get(name)
            if held is not None and (held.build.__module__, held.build.__qualname__) != (
                build.__module__,
                build.__qualname__,
            ):
                origin = _plugins.loading or build.__module__
                raise PluginError(
                    f"{self.kind} {name!r} of {origin} is already taken by {held.origin}; "
                    "register it under another name"
                )
            self._entries[name] = Entry(name, build, _plugins.loading or build.__module__, _plugins.version)
            return build

        return keep

    def claim(self, module: str, origin: str, version: str | None) -> None:
        """Say whose the builders of a module are that was imported before the entry points were loaded."""
        for name, held in self._entries.items():
            if held.origin == held.build.__module__ == module:
                self._entries[name] = replace(held, origin=origin, version=version)

    def register_family(self, prefix: str) -> Callable[[Callable[[str], Entry]], Callable[[str], Entry]]:
        """Decorator: have the decorated function find what is named ``prefix``/… ."""

        def keep(find: Callable[[str], Entry]) -> Callable[[str], Entry]:
            self._families[prefix] = Family(prefix, find)
            return find

        return keep

    def entry(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            RecipeError: no such name; the message has the known ones and the plugins that failed to load.
            PluginError: the library that the name belongs to is not there, or does not import.
        """
        _plugins.load()
        prefix, slash, rest = name.partition("/")
        if name not in self._entries and slash and prefix in self._families:
            return self._families[prefix].find(rest)
        if name not in self._entries:
            raise RecipeError(self.unknown(name))
        return self._entries[name]

    def get(self, name: str) -> Callable[..., Any]:
        """The builder of this name; errors as for :meth:`entry`."""
        return self.entry(name).build

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The parameters of this builder that a recipe may set, with their defaults and annotations."""
        return self.options_of(self.get(name))

    def options_of(self, build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
        """As ``options``, of a builder in hand."""
        # eval_str: the package's modules postpone their annotations, and a reader of options wants types, not strings.
        parameters = inspect.signature(build, eval_str=True).parameters
        return {key: p for key, p in parameters.items() if key not in self.supplied and p.kind != p.POSITIONAL_ONLY}

    def unknown(self, name: str) -> str:
        """The sentence that says that ``name`` is not known."""
        message = f"unknown {self.kind} {name!r}"
        families = [family.prefix for family in self.families()]
        near = closest_match(name, [*self.names(), *(f"{prefix}/{name.partition('/')[2]}" for prefix in families)])
        message += f", did you mean {near!r}?" if near else ";"
        message += f" known: {', '.join([*self.names(), *(f'{prefix}/…' for prefix in families)]) or 'none'}"
        if _plugins.failures:
            message += f" (not loaded: {'; '.join(str(e) for e in _plugins.failures)})"
        return message

    def names(self) -> list[str]:
        _plugins.load()
        return sorted(self._entries)

    def families(self) -> list[Family]:
        """The libraries whose models can be named."""
        _plugins.load()
        return [self._families[prefix] for prefix in sorted(self._families)]

    def __contains__(self, name: str) -> bool:
        _plugins.load()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._entries[name] for name in self.names()])


class _Plugins:
    """Loads the entry points once; a plugin that fails is kept as an error and does not stop the others."""

    def __init__(self) -> None:
        self.loaded = False
        self.loading: str | None = None
        self.version: str | None = None
        self.failures: list[PluginError] = []

    def load(self, quiet: bool = False) -> None:
        """Load them; a failure is a warning, but for a caller that says it himself (``quiet``)."""
        if self.loaded:
            return
        # Set first: a plugin that looks something up while it is imported must not start the loading again.
        self.loaded = True
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        # Our own first, so that a plugin that takes one of our names is the one that is refused.
        for point in sorted(points, key=lambda p: (p.dist is None or p.dist.name != "prunekit", p.name, p.value)):
            self.loading = point.dist.name if point.dist else point.value
            self.version = point.dist.version if point.dist else None
            try:
                point.load()
                for table in _tables:
                    table.claim(point.value.partition(":")[0], self.loading, self.version)
            except (Exception, SystemExit) as error:  # A module that ends the program ends no more than itself.
                failure = PluginError(
                    f"plugin {point.name!r} of {self.loading} failed to load ({describe_error(error)}); "
                    f"mend it, or uninstall it with: pip uninstall {self.loading}"
                )
                self.failures.append(failure)
            finally:
                self.loading = self.version = None
        for failure in self.failures if not quiet else ():
            warnings.warn(str(failure), PrunekitWarning, stacklevel=3)


def closest_match(word: str, known: list[str]) -> str | None:
    """The known word closest to a mistyped one, or None where nothing is close."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def describe_error(error: BaseException) -> str:
    """What went wrong, in one line: our own errors as they stand, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PrunekitError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def parameter_names(build: Callable[..., Any]) -> list[str]:
    """The names of a builder's parameters."""
    return list(inspect.signature(build).parameters)


def required_parameters(build: Callable[..., Any]) -> list[str]:
    """The names of the parameters that a builder cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(build).parameters.values()
    return [p.name for p in found if p.default is p.empty and p.kind in kinds]


def plugin_failures() -> list[PluginError]:
    """The plugins that could not be loaded; the caller is to say them."""
    _plugins.load(quiet=True)
    return list(_plugins.failures)


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
