"""The texts of a recipe (files, their bases, overrides) laid over each other, with the place of every value."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.config import registry, schema, yaml
from prunekit.config.yaml import format_path, quote
from prunekit.errors import RecipeError


@dataclass(frozen=True, order=True)
class SourceLocation:
    """Where something was written; places sort as a reader meets them: the file, its bases, the overrides."""

    rank: int
    line: int
    column: int
    text: str


@dataclass(frozen=True, order=True)
class RecipeProblem:
    """One line of an error: the place, the key, what is wrong and its mend."""

    place: SourceLocation
    path: yaml.Path = field(compare=False)
    message: str = field(compare=False)

    def __str__(self) -> str:
        # One line whatever a plugin's own error, which may be quoted here, looks like.
        return ": ".join(filter(None, (self.place.text, format_path(self.path), _one_line(self.message))))


@dataclass
class ConfigTree:
    """The values of one or several texts.

    Attributes:
        value: what was written, nothing checked.
        places: path → place, for whatever is named in a text.
        mistakes: what is wrong in the texts themselves.
        complete: False where a text could not be read, so that nothing follows from what is absent.
    """

    value: dict[str, Any] = field(default_factory=dict)
    places: dict[yaml.Path, SourceLocation] = field(default_factory=dict)
    mistakes: list[RecipeProblem] = field(default_factory=list)
    complete: bool = True

    def place(self, path: yaml.Path) -> SourceLocation:
        """The place of a path; for one that nobody wrote, of something in it, or of what it would stand in."""
        if path not in self.places:
            within = next((self.places[p] for p in _paths(self.at(path), path) if p in self.places), None)
            return within or self.place(path[:-1])
        return self.places[path]

    def at(self, path: yaml.Path) -> Any:
        """The value at this path, or None."""
        value: Any = self.value
        for part in path:
            if not yaml.contains(value, part):
                return None
            value = value[part]
        return value

    def complain(self, path: yaml.Path, message: str, place: SourceLocation | None = None) -> None:
        self.mistakes.append(RecipeProblem(place or self.place(path), path, message))

    def spell_out(self) -> None:
        """Write ``optimizer: adam`` as ``optimizer: {name: adam}``, so that it can be merged."""
        for path in schema.NAMED:
            stage = self.at(path[:-1])
            if isinstance(stage, dict) and isinstance(stage.get(path[-1]), str):
                self.places[(*path, "name")] = self.place(path)
                stage[path[-1]] = {"name": stage[path[-1]]}

    def lay(self, upper: ConfigTree, drop_options: bool = True) -> None:
        """Lay another tree over this one: mappings deeply, all else replaced.

        Args:
            upper: the tree that wins.
            drop_options: whether a new ``name`` takes away the ``options`` that belonged to the old one.
        """
        self.value = self._lay(self.value, upper.value, (), upper, drop_options)
        self.mistakes += upper.mistakes
        self.complete &= upper.complete

    def _lay(self, old: Any, new: Any, path: yaml.Path, upper: ConfigTree, drop_options: bool) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            self._forget(old, path)
            self.places.update({p: upper.places[p] for p in _paths(new, path) if p in upper.places})
            return new
        if path in upper.places:
            self.places[path] = upper.places[path]
        if drop_options and path in schema.REGISTRIES and "name" in new and "options" in old:
            name = old.get("name", schema.default_name(path))
            if name is not None and name != new["name"]:
                self._forget(old.pop("options"), (*path, "options"))
        for key, value in new.items():
            old[key] = self._lay(old.get(key), value, (*path, key), upper, drop_options)
        return old

    def _forget(self, value: Any, path: yaml.Path) -> None:
        for gone in _paths(value, path):
            self.places.pop(gone, None)


def load_tree(source: str | Path, overrides: Sequence[str] = ()) -> ConfigTree:
    """Read a recipe with its bases and overrides; what is wrong with the texts stands in ``mistakes``.

    Raises:
        RecipeError: there is no such recipe.
    """
    layers = _read_with_bases(find_recipe(source))
    tree = ConfigTree()
    for layer in reversed(layers):
        tree.lay(layer)
    # All overrides are one layer: whether options or their name come first on a command line makes no difference.
    together = ConfigTree()
    for number, text in enumerate(overrides):
        together.lay(
            _read_override(text, SourceLocation(len(layers), number, 0, f"override {quote(text, 200)}")), False
        )
    tree.lay(together)
    if tree.complete:
        for path in schema.NAMED:
            # `optimizer: {options: …}` alone sets options of the default one.
            if isinstance(tree.at(path), dict):
                tree.at(path).setdefault("name", schema.default_name(path))
    return tree


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: a path, or the bare name of a shipped recipe (``csnet`` or ``csnet.yaml``).

    Raises:
        RecipeError: there is no such file, or it is a folder; the message has the shipped names.
    """
    text = str(source)
    try:
        path = Path(text).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{quote(text)}: not a usable file name ({_one_line(error)}); give another") from None
    if text and exists and not is_folder:
        return path
    if text and is_folder and text.removesuffix(".yaml") not in _shipped_files():
        inside = path / ("recipe.yaml" if (path / "recipe.yaml").is_file() else "THE_RECIPE.yaml")
        raise RecipeError(f"{text}: is a folder, not a recipe; did you mean {inside}?")
    return _find_shipped(text)


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with prunekit."""
    return list(_shipped_files())


def _find_shipped(name: str) -> Path:
    files = _shipped_files()
    bare = name.removesuffix(".yaml")
    if bare in files:
        return files[bare]
    near = registry.closest_match(bare.rpartition("/")[2][:100], list(files))
    hint = f"did you mean {near!r}? " if near else ""
    known = ", ".join(files) or "none"
    raise RecipeError(f"{quote(name)}: no such file, nor a shipped recipe of this name; {hint}shipped: {known}")


def _shipped_files() -> dict[str, Path]:
    try:
        items = sorted(importlib.resources.files("prunekit.recipes").iterdir(), key=lambda item: item.name)
    except ModuleNotFoundError:
        # An editable install shows no folder without __init__.py as a package; what is then said is "shipped: none".
        return {}
    return {item.name.removesuffix(".yaml"): Path(str(item)) for item in items if item.name.endswith(".yaml")}


def _read_with_bases(path: Path) -> list[ConfigTree]:
    """The tree of a file, of its base, of that one's base, …"""
    layers: list[ConfigTree] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        try:
            layer = _read_file(following, len(layers))
        except OSError as error:
            message = (
                f"{following}: cannot be read ({_one_line(error.strerror or error)}); mend its permissions or path"
            )
            if not layers:
                raise RecipeError(message) from None
            layers[-1].complain(("base",), message)
            layers[-1].complete = False
            break
        layers.append(layer)
        seen.append(following.resolve())
        following = _base(layer, following, seen)
        # Not a key of the recipe; its place stays for what may still be said about it.
        layer.value.pop("base", None)
    return layers


def _base(layer: ConfigTree, path: Path, seen: list[Path]) -> Path | None:
    base = layer.value.get("base")
    if base is None:
        return None
    try:
        if not isinstance(base, str):
            raise RecipeError(f"{quote(base)} is not text; give one file or the name of a shipped recipe")
        beside = path.parent / Path(base).expanduser()
        found = beside if "\0" not in base and beside.is_file() else _find_shipped(base)
        if found.resolve() in seen:
            circle = " → ".join(p.name for p in (*seen[seen.index(found.resolve()) :], found))
            raise RecipeError(f"the bases go in a circle ({circle}); remove one of them")
        return found
    except (RecipeError, OSError, RuntimeError) as error:
        layer.complain(("base",), _one_line(error))
        layer.complete = False
        return None


def _read_file(path: Path, rank: int) -> ConfigTree:
    with path.open("rb") as file:
        document = yaml.parse(file.read(yaml.MAX_BYTES + 1))

    def place(line: int, column: int) -> SourceLocation:
        return SourceLocation(rank, line, column, f"{path}:{line}:{column}")

    tree = ConfigTree(complete=document.complete)
    tree.places = {p: place(*at) for p, at in document.places.items()} | {(): place(1, 1)}
    for problem in document.problems:
        tree.complain(problem.path, problem.message, place(problem.line, problem.column))
    if isinstance(document.value, dict):
        tree.value = document.value
    elif not document.problems:
        what = "it is empty" if document.value is None else f"this is {quote(document.value)}"
        tree.complain((), f"a recipe is made of 'key: value' lines, {what}; begin with 'name: …'")
        tree.complete = False
    tree.spell_out()
    return tree


def _read_override(text: str, place: SourceLocation) -> ConfigTree:
    tree = ConfigTree(places={(): place})
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals:
        tree.complain((), "has no '='; write key=value, such as train.lr=1e-3")
    elif not all(part and part.isprintable() for part in path) or len(path) > yaml.MAX_DEPTH:
        tree.complain((), "the key is not one of names with dots between; write it such as train.lr=1e-3")
    elif path == ("base",):
        tree.complain(path, "can stand only in a file; give the other recipe itself, or make a file with this base")
    else:
        document = yaml.parse(value)
        for problem in document.problems:
            tree.complain((*path, *problem.path), problem.message, place)
        tree.places |= {(*path, *below): place for below in document.places}
        # Also where it could not be read: then nothing is said to be missing there.
        tree.places[path] = place
        tree.value = document.value
        for part in reversed(path):
            tree.value = {part: tree.value}
        tree.spell_out()
    # The whole is still the file's: what an override does not name is not its mistake.
    del tree.places[()]
    return tree


def _paths(value: Any, path: yaml.Path) -> Iterator[yaml.Path]:
    """The path of a value and of all that it holds."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
