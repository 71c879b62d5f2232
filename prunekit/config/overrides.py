"""Find a recipe and its bases, parse overrides, and merge them while keeping the location of every value."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.config import schema, yaml
from prunekit.config.yaml import format_path, quote
from prunekit.errors import RecipeError
from prunekit.utils.text import closest_match, did_you_mean, one_line


@dataclass(frozen=True, order=True)
class SourceLocation:
    """Where a value was written; sorts by the recipe, its bases, then the overrides."""

    rank: int  # index of the file, or the number of files for an override
    line: int  # from 1; for an override its index
    column: int
    text: str  # as shown in messages
    file: Path | None = field(default=None, compare=False)  # None for an override


@dataclass(frozen=True, order=True)
class RecipeProblem:
    location: SourceLocation
    path: yaml.Path = field(compare=False)
    message: str = field(compare=False)  # what is wrong, and the fix

    def __str__(self) -> str:
        # The message may quote a plugin's multi-line error.
        return ": ".join(filter(None, (self.location.text, format_path(self.path), one_line(self.message))))


@dataclass
class ConfigTree:
    """Unchecked values of one or several texts, and what is wrong with them so far."""

    value: dict[str, Any] = field(default_factory=dict)
    locations: dict[yaml.Path, SourceLocation] = field(default_factory=dict)
    errors: list[RecipeProblem] = field(default_factory=list)
    complete: bool = True  # False if a text could not be read, so that missing keys are not errors

    def location(self, path: yaml.Path) -> SourceLocation:
        """Return the location of a path; if it was not written, that of a value below it or else of its parent."""
        # A path that does not exist may still have the location of a value that was replaced.
        exists = not path or yaml.contains(self.get(path[:-1]), path[-1])
        written = (self.locations[p] for p in _paths(self.get(path), path) if exists and p in self.locations)
        return next(written, None) or self.location(path[:-1])

    def get(self, path: yaml.Path) -> Any:
        """Return the value at this path, or None."""
        value: Any = self.value
        for part in path:
            if not yaml.contains(value, part):
                return None
            value = value[part]
        return value

    def add_error(self, path: yaml.Path, message: str, location: SourceLocation | None = None) -> None:
        self.errors.append(RecipeProblem(location or self.location(path), path, message))

    def expand_names(self) -> None:
        """Replace ``optimizer: adam`` by ``optimizer: {name: adam}``, so that it can be merged."""
        for path in schema.REGISTRIES:
            section = self.get(path[:-1])
            if isinstance(section, dict) and isinstance(section.get(path[-1]), str):
                self.locations[(*path, "name")] = self.location(path)
                section[path[-1]] = {"name": section[path[-1]]}

    def merge(self, upper: ConfigTree, drop_options: bool = True) -> None:
        """Merge ``upper`` over this tree: mappings recursively, other values are replaced.

        With ``drop_options``, a new ``name`` removes the ``options`` of the old one, and a new target the old target.
        """
        self.value = _merge(self.value, upper.value, (), drop_options)
        self.locations |= upper.locations
        self.errors += upper.errors
        self.complete &= upper.complete


def _merge(old: Any, new: Any, path: yaml.Path, drop_options: bool) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if drop_options and path == ("target",) and any(value is not None for value in new.values()):
        return new
    if drop_options and path in schema.REGISTRIES and "name" in new:
        name = old.get("name", schema.default_name(path))
        if name is not None and name != new["name"]:
            old.pop("options", None)
    return old | {key: _merge(old.get(key), value, (*path, key), drop_options) for key, value in new.items()}


def load_tree(source: str | Path, overrides: Sequence[str] = ()) -> ConfigTree:
    """Read a recipe with its bases and overrides; syntax errors are in ``errors``.

    Raises:
        RecipeError: the recipe does not exist.
    """
    layers = _read_with_bases(find_recipe(source))
    tree = ConfigTree()
    for layer in reversed(layers):
        tree.merge(layer)
    # The overrides are one layer: the order of a name and its options on the command line must not matter.
    merged = ConfigTree()
    for number, text in enumerate(overrides):
        location = SourceLocation(len(layers), number, 0, f"override {quote(text, 200)}")
        merged.merge(_read_override(text, location), drop_options=False)
    tree.merge(merged)
    if tree.complete:
        for path in schema.COMPONENTS:
            # `optimizer: {options: …}` alone sets options of the default optimizer.
            if isinstance(tree.get(path), dict):
                tree.get(path).setdefault("name", schema.default_name(path))
    return tree


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe, given as a path or as the name of a shipped recipe (``csnet``, ``csnet.yaml``).

    Raises:
        RecipeError: there is no such file, or it is a folder.
    """
    text = str(source)
    try:
        path = Path(text).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{quote(text)}: not a valid file name ({one_line(error)}); use another") from None
    if text and exists and not is_folder:
        return path
    if text and is_folder and text.removesuffix(".yaml") not in shipped_recipes():
        inside = path / ("recipe.yaml" if (path / "recipe.yaml").is_file() else "THE_RECIPE.yaml")
        raise RecipeError(f"{text}: is a folder, not a recipe; did you mean {inside}?")
    return _find_shipped(text)


def shipped_recipes() -> dict[str, Path]:
    """Return name → file of the recipes that come with prunekit, sorted by name."""
    try:
        files = importlib.resources.files("prunekit.recipes").iterdir()
    except ModuleNotFoundError:
        # An editable install does not treat a folder without __init__.py as a package.
        return {}
    return {f.name.removesuffix(".yaml"): Path(str(f)) for f in sorted(files, key=str) if f.name.endswith(".yaml")}


def _find_shipped(name: str) -> Path:
    files = shipped_recipes()
    stem = name.removesuffix(".yaml")
    if stem in files:
        return files[stem]
    match = closest_match(stem.rpartition("/")[2][:100], list(files))
    hint = f"; did you mean {match!r}?" if match else did_you_mean(Path(name)) if "\0" not in name else ""
    known = f"{'' if hint else ';'} shipped recipes: {', '.join(files) or 'none'}"
    raise RecipeError(f"{quote(name)}: no such file or shipped recipe{hint}{known}")


def _read_with_bases(path: Path) -> list[ConfigTree]:
    """Return the trees of a file, of its base, of that base's base, …"""
    layers: list[ConfigTree] = []
    visited: list[Path] = []
    current: Path | None = path
    while current is not None:
        try:
            layer = _read_file(current, len(layers))
        except OSError as error:
            message = f"{current}: cannot be read ({one_line(error.strerror or error)}); fix its permissions or path"
            if not layers:
                raise RecipeError(message) from None
            layers[-1].add_error(("base",), message)
            layers[-1].complete = False
            break
        layers.append(layer)
        visited.append(current.resolve())
        current = _find_base(layer, current, visited)
        # `base` is not a recipe key; its location is kept for later errors.
        layer.value.pop("base", None)
    return layers


def _find_base(layer: ConfigTree, path: Path, visited: list[Path]) -> Path | None:
    base = layer.value.get("base")
    if base is None:
        return None
    try:
        if not isinstance(base, str):
            raise RecipeError(f"{quote(base)} is not a string; give one file or the name of a shipped recipe")
        sibling = path.parent / Path(base).expanduser()
        found = sibling if "\0" not in base and sibling.is_file() else _find_shipped(base)
        if found.resolve() in visited:
            cycle = " → ".join(p.name for p in (*visited[visited.index(found.resolve()) :], found))
            raise RecipeError(f"the bases form a cycle ({cycle}); remove one of them")
        return found
    except (RecipeError, OSError, RuntimeError) as error:
        layer.add_error(("base",), one_line(error))
        layer.complete = False
        return None


def _read_file(path: Path, rank: int) -> ConfigTree:
    with path.open("rb") as file:
        document = yaml.parse(file.read(yaml.MAX_BYTES + 1))

    def location(line: int, column: int) -> SourceLocation:
        return SourceLocation(rank, line, column, f"{path}:{line}:{column}", path)

    tree = ConfigTree(complete=document.complete)
    tree.locations = {p: location(*position) for p, position in document.positions.items()} | {(): location(1, 1)}
    for problem in document.problems:
        tree.add_error(problem.path, problem.message, location(problem.line, problem.column))
    if isinstance(document.value, dict):
        tree.value = document.value
    elif not document.problems:
        content = "it is empty" if document.value is None else f"this is {quote(document.value)}"
        tree.add_error((), f"a recipe consists of 'key: value' lines, {content}; start with 'name: …'")
        tree.complete = False
    tree.expand_names()
    return tree


def _read_override(text: str, location: SourceLocation) -> ConfigTree:
    tree = ConfigTree(locations={(): location})
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals:
        tree.add_error((), "has no '='; write key=value, such as train.lr=1e-3")
    elif not all(part and part.isprintable() for part in path) or len(path) > yaml.MAX_DEPTH:
        tree.add_error((), "the key is not a sequence of names separated by dots; write it such as train.lr=1e-3")
    elif path == ("base",):
        tree.add_error(path, "is allowed only in a file; give the other recipe itself, or make a file with this base")
    else:
        document = yaml.parse(value)
        for problem in document.problems:
            tree.add_error((*path, *problem.path), problem.message, location)
        tree.locations |= {(*path, *below): location for below in document.positions}
        # Also if the value could not be read, so that nothing is reported as missing there.
        tree.locations[path] = location
        tree.value = document.value
        for part in reversed(path):
            tree.value = {part: tree.value}
        tree.expand_names()
    # The root remains the file's: a key that the override does not set is not its error.
    del tree.locations[()]
    return tree


def _paths(value: Any, path: yaml.Path) -> Iterator[yaml.Path]:
    """Yield the path of a value and of everything in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))
