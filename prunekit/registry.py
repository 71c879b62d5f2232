"""Names → builders, for backbones, data sets, tasks and decays.

Everything registered, the package's own included, comes in through the entry-point group ``prunekit.plugins``: each
entry point names a module whose import registers something. They are loaded at the first look-up, so that importing
prunekit costs nothing, and this module imports nothing above it.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prunekit.errors import PluginError, RecipeError

ENTRY_POINT_GROUP = "prunekit.plugins"


@dataclass(frozen=True)
class Entry:
    """One registered builder and the distribution that brought it."""

    name: str
    build: Callable[..., Any]
    origin: str

    @property
    def summary(self) -> str:
        """The first line of the builder's docstring."""
        return (self.build.__doc__ or "").strip().partition("\n")[0]


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

    def register(self, name: str) -> Callable[[Callable], Callable]:
        """Decorator: make ``name`` stand for the decorated builder.

        Raises:
            PluginError: the name is taken by another builder.
        """

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
            self._entries[name] = Entry(name, build, _plugins.loading or build.__module__)
            return build

        return keep

    def entry(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            RecipeError: no such name; the message has the known ones and the plugins that failed to load.
        """
        _plugins.load()
        if name not in self._entries:
            raise RecipeError(self.unknown(name))
        return self._entries[name]

    def get(self, name: str) -> Callable[..., Any]:
        """The builder of this name; errors as for :meth:`entry`."""
        return self.entry(name).build

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The parameters of this builder that a recipe may set, with their defaults and annotations."""
        # eval_str: the package's modules postpone their annotations, and a reader of options wants types, not strings.
        parameters = inspect.signature(self.get(name), eval_str=True).parameters
        return {key: p for key, p in parameters.items() if key not in self.supplied and p.kind != p.POSITIONAL_ONLY}

    def unknown(self, name: str) -> str:
        """The sentence that says that ``name`` is not known."""
        message = f"unknown {self.kind} {name!r}"
        near = nearest(name, self.names())
        message += f", did you mean {near!r}?" if near else ";"
        message += f" known: {', '.join(self.names()) or 'none'}"
        if _plugins.failures:
            message += f" (not loaded: {'; '.join(str(e) for e in _plugins.failures)})"
        return message

    def names(self) -> list[str]:
        _plugins.load()
        return sorted(self._entries)

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
        self.failures: list[PluginError] = []

    def load(self) -> None:
        if self.loaded:
            return
        # Set first: a plugin that looks something up while it is imported must not start the loading again.
        self.loaded = True
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        # Our own first, so that a plugin that takes one of our names is the one that is refused.
        for point in sorted(points, key=lambda p: (p.dist is None or p.dist.name != "prunekit", p.name, p.value)):
            self.loading = point.dist.name if point.dist else point.value
            try:
                point.load()
            except Exception as error:
                reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
                self.failures.append(
                    PluginError(
                        f"plugin {point.name!r} of {self.loading} failed to load ({reason}); "
                        f"mend it, or uninstall it with: pip uninstall {self.loading}"
                    )
                )
            finally:
                self.loading = None


def nearest(word: str, known: list[str]) -> str | None:
    """The known word closest to a mistyped one, or None where nothing is close."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def parameters(build: Callable[..., Any]) -> list[str]:
    """The names of a builder's parameters."""
    return list(inspect.signature(build).parameters)


def plugin_failures() -> list[PluginError]:
    """The plugins that could not be loaded."""
    _plugins.load()
    return list(_plugins.failures)


_plugins = _Plugins()
backbones = Registry("backbone")
datasets = Registry("data set", ("split", "root", "val_root", "val_holdout", "size", "seed", "on_error"))
tasks = Registry("task")
decays = Registry("decay", ("model", "groups", "weight"))
criteria = Registry("criterion", ("model", "groups", "losses"))
optimizers = Registry("optimizer", ("groups",))
schedules = Registry("schedule", ("progress",))
augmentations = Registry("augmentation", ("images", "targets", "sizes", "generator"))

register_backbone = backbones.register
register_dataset = datasets.register
register_task = tasks.register
register_decay = decays.register
register_criterion = criteria.register
register_optimizer = optimizers.register
register_schedule = schedules.register
register_augmentation = augmentations.register
