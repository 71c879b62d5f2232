"""Recipes: YAML and ``key=value`` overrides in, checked models out; torch-free until a name is looked up.

Two passes, whose mistakes are reported together: the first checks the values against
:mod:`prunekit.config.schema`, the second
looks names up in the registries and holds their options against the signatures of the builders.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pydantic

from prunekit.config import registry, schema, yaml
from prunekit.config.schema import Backbone, Checkpoint, Data, Decay, Export, Named, Recipe, Slim, Training
from prunekit.config.sources import ConfigTree, load_tree
from prunekit.config.user_module import UserModule
from prunekit.config.yaml import format_path, quote
from prunekit.errors import PrunekitError, RecipeError

__all__ = [
    "Backbone",
    "Checkpoint",
    "Data",
    "Decay",
    "Export",
    "Named",
    "Recipe",
    "Slim",
    "Training",
    "load",
]

# What pydantic calls an error → what is wrong, and its mend.
_TYPES = {
    "int_type": ("is not a whole number", "give one, such as 10"),
    "int_from_float": ("is not a whole number", "give one, such as 10"),
    "float_type": ("is not a number", "give one, such as 0.1"),
    "bool_type": ("is not true or false", "give one of the two"),
    "string_type": ("is not text", "put it in quotes if it is meant as text"),
    "none_required": ("is not null", "give null"),
    "model_type": ("is not a mapping", "write 'key: value' lines below it"),
    "dict_type": ("is not a mapping", "write 'key: value' lines below it"),
    "list_type": ("is not a list", "write it in brackets, such as [1, 2]"),
    "tuple_type": ("is not a list", "write it in brackets, such as [1, 2]"),
    "set_type": ("is not a list", "write it in brackets, such as [1, 2]"),
}
_BOUNDS = {
    "greater_than": ("is too low", "it must be above", "gt"),
    "greater_than_equal": ("is too low", "it must be at least", "ge"),
    "less_than": ("is too high", "it must be below", "lt"),
    "less_than_equal": ("is too high", "it must be at most", "le"),
}
_ROOTS = ("root", "val_root", "val_holdout")


def load(source: str | Path, overrides: Sequence[str] = (), *, untrusted: bool = False) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        source: a file, or the bare name of a shipped recipe.
        overrides: ``a.b.c=value`` each, the value in YAML; laid over the file after its ``base``.
        untrusted: whether the file may be somebody else's, as a run folder's: a ``backbone.file`` in it is imported only
            if the user has vouched for that, see ``userfile``.

    Returns:
        The recipe with every default filled in, those of the builders' options included.

    Raises:
        RecipeError: one line for each mistake, each ``file:line:column: key: what is wrong; mend`` (for an override its
            text stands instead of the place).
    """
    tree = load_tree(source, overrides)
    in_texts = tree.mistakes
    at_fault = {mistake.path for mistake in in_texts}
    tree.mistakes = []
    _check_schema(tree)
    _check_names(tree, untrusted)
    # What could not be read is None in the tree; that None does not fit is no second mistake.
    of_values = [m for m in tree.mistakes if not any(m.path[: n + 1] in at_fault for n in range(len(m.path)))]
    if mistakes := sorted(in_texts + of_values):
        raise RecipeError("\n".join(dict.fromkeys(map(str, mistakes))))
    recipe = Recipe.model_validate_json(json.dumps(tree.value))
    for path, what in schema.conflicts(recipe):
        tree.complain(path, what)
    if tree.mistakes:
        raise RecipeError("\n".join(map(str, sorted(tree.mistakes))))
    return recipe


def _check_schema(tree: ConfigTree) -> None:
    """The first pass: keys, types and ranges."""
    try:
        Recipe.model_validate_json(json.dumps(tree.value))
    except pydantic.ValidationError as error:
        for path, found in _by_path(error, tree.value).items():
            kind = found[0]["type"]
            if kind == "extra_forbidden":
                tree.complain(path, _unknown_key(path))
            elif kind == "model_type" and "name" in schema.section(path).model_fields:
                tree.complain(
                    path, f"{quote(found[0]['input'])} is not a mapping; set {format_path((*path, 'name'))} instead"
                )
            elif kind != "missing":
                tree.complain(path, _misfit(found))
            elif tree.complete:
                needed = [k for k, f in (schema.section(path) or Recipe).model_fields.items() if f.is_required()]
                add = f"the section with {' and '.join(needed)}" if schema.section(path) else f"'{path[-1]}: …'"
                tree.complain(path, f"is missing; add {add}")


def _check_names(tree: ConfigTree, untrusted: bool) -> None:
    """The second pass: names, options and the keys that not every data set takes; fills in names and options."""
    task = tree.at(("task",)) if "task" in tree.value else Recipe.model_fields["task"].default
    if isinstance(task, str) and task not in registry.tasks:
        tree.complain(("task",), registry.tasks.unknown(task))
    for path, table in schema.REGISTRIES.items():
        holder = tree.value if len(path) == 1 else tree.at(path[:-1])
        part = holder.get(path[-1], {}) if isinstance(holder, dict) else None
        if not isinstance(part, dict):
            continue
        if path == ("backbone",) and part.get("file") is not None:
            holder[path[-1]] = _check_file(tree, part, untrusted)
            continue
        # A name that stands in a text we could not read is not the default one.
        name = part.get("name", schema.default_name(path) if tree.complete else None)
        if not isinstance(name, str):
            continue
        names: registry.Registry = getattr(registry, table)
        try:
            build = names.get(name)
        except PrunekitError as error:
            tree.complain((*path, "name"), str(error))
            continue
        options = part.get("options", {})
        if isinstance(options, dict):
            options = _check_options(tree, path, f"{names.kind} {name!r}", partial(names.options_of, build), options)
        if path == ("data",):
            _check_roots(tree, name, build, part)
        holder[path[-1]] = {**part, "name": name, "options": options}


def _check_file(tree: ConfigTree, part: dict[str, Any], untrusted: bool) -> dict[str, Any]:
    """The section of a backbone from a user's file: the file found and noted as it is now, its options checked."""
    path = ("backbone",)
    file, name, options = part["file"], part.get("name"), part.get("options", {})
    if not (isinstance(file, str) and isinstance(name, str)):
        return part
    place = tree.place((*path, "file"))
    # As the shell means it where it is an override (which has no column), else beside the file that names it.
    folder = Path(place.text.rsplit(":", 2)[0]).parent if place.column else Path()
    try:
        source = UserModule.read(file, folder)
        if source.change:
            mend = f"put that version back, or go on with this one by backbone.file={source.path}"
            raise RecipeError(f"{source.change}; {mend}")
        if untrusted and place.column:
            source.check_trusted()
        else:
            source.trust()
        build = source.load_function(name)
    except PrunekitError as error:
        tree.complain((*path, "file"), str(error))
        return part
    if isinstance(options, dict):
        owner = f"backbone {name!r} of {source.path.name}"
        options = _check_options(tree, path, owner, partial(registry.backbones.options_of, build), options)
    return {**part, "file": source.pinned_path, "options": options}


def _check_options(
    tree: ConfigTree,
    path: yaml.Path,
    owner: str,
    parameters: Callable[[], dict[str, inspect.Parameter]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options with the builder's defaults, as plain values; mistakes go to the tree."""
    path = (*path, "options")
    try:
        model = _options_model(parameters())
    except Exception as error:  # Whatever the annotations of a plugin raise when they are evaluated.
        reason = f"{type(error).__name__}: {error}"
        tree.complain(path, f"the signature of {owner} cannot be read ({reason}); mend its annotations")
        return options
    try:
        resolved = _plain(model.model_validate_json(json.dumps(options)))
    except pydantic.ValidationError as error:
        for below, found in _by_path(error, options).items():
            kind, where = found[0]["type"], (*path, *below)
            if kind == "extra_forbidden":
                tree.complain(where, _unknown_option(where, owner, list(model.model_fields.values())))
            elif kind != "missing":
                tree.complain(where, _misfit(found))
            elif tree.complete:
                tree.complain(where, f"is missing; {owner} needs it, add '{format_path(where[-1:])}: …'")
        return options
    except ValueError as error:
        tree.complain(
            path, f"a default of {owner} cannot stand in YAML ({error}); its builder should take plain values"
        )
        return options
    try:
        # Defaults are unchecked so far. Once more, so that a dumped recipe is sure to load, and to the same values.
        return _plain(model.model_validate_json(json.dumps(resolved)))
    except pydantic.ValidationError as error:
        for below, found in _by_path(error, resolved).items():
            what, _ = _misfit(found).rsplit(";", 1)
            tree.complain((*path, *below), f"the default of {owner}, {what}; give another value, or mend its builder")
        return options


def _options_model(parameters: dict[str, inspect.Parameter]) -> type[pydantic.BaseModel]:
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        if default is None:
            annotation = annotation | None
        # By alias: `copy` and `json` are good names for options, but not for fields of a model.
        fields[f"option_{len(fields)}"] = (annotation, pydantic.Field(default, alias=key))
    config = pydantic.ConfigDict(
        extra="allow" if open_ended else "forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )
    return pydantic.create_model("Options", __config__=config, **fields)


def _plain(options: pydantic.BaseModel) -> dict[str, Any]:
    return options.model_dump(mode="json", by_alias=True, warnings=False)


def _check_roots(tree: ConfigTree, name: str, build: Any, part: dict[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in _ROOTS:
        if key not in parameters and part.get(key) is not None:
            mend = f"remove it (data.{key}=null) or name a data set that reads folders (folder, image_folder)"
            tree.complain(("data", key), f"data set {name!r} takes no {key}; {mend}")
    needed = "root" in parameters and parameters["root"].default is inspect.Parameter.empty
    if needed and part.get("root") is None and tree.complete:
        tree.complain(("data", "root"), f"data set {name!r} reads a folder; name it with data.root=FOLDER")


def _by_path(error: pydantic.ValidationError, value: Any) -> dict[yaml.Path, list[Any]]:
    """The errors by their place in ``value``: those of a union, which pydantic reports one by one, together."""
    found: dict[yaml.Path, list[Any]] = {}
    for one in error.errors(include_url=False):
        path: yaml.Path = ()
        inner = value
        for part in one["loc"]:
            if yaml.contains(inner, part):
                inner = inner[part]
            elif one["type"] != "missing" or part != one["loc"][-1]:
                break
            path = (*path, part)
        found.setdefault(path, []).append(one)
    return found


def _misfit(errors: list[Any]) -> str:
    """What is wrong with one value, and the mend."""
    value = errors[0]["input"]
    phrases = dict.fromkeys(_phrase(one["type"], one["input"], one.get("ctx", {}), one["msg"]) for one in errors)
    mends = dict.fromkeys(mend for _, mend in phrases)
    return f"{quote(value)} {' and '.join(what for what, _ in phrases)}; {' or '.join(mends)}"


def _phrase(kind: str, value: Any, context: dict[str, Any], message: str) -> tuple[str, str]:
    if kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(yaml.parse(value).value):
        return "is text", "remove the quotes"
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return "is not a whole number", f"write {int(value)}"
    if kind in _TYPES:
        return _TYPES[kind]
    if kind in _BOUNDS:
        what, mend, key = _BOUNDS[kind]
        bound = context[key]
        return what, f"{mend} {int(bound) if bound == int(bound) else bound}"
    if kind == "literal_error":
        return "is not known", f"give {context['expected']}"
    if kind == "value_error":
        what, _, mend = str(context["error"]).partition("; ")
        return what, mend or "give another value"
    return f"does not fit ({message[:1].lower()}{message[1:]})", "give another value"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unknown_key(path: yaml.Path) -> str:
    known = list((schema.section(path[:-1]) or Recipe).model_fields)
    # A known key at a wrong level says more than one that looks alike.
    elsewhere = [format_path(other) for other in schema.all_keys() if other[-1] == path[-1]]
    if elsewhere:
        return f"unknown key, it belongs elsewhere; write {' or '.join(elsewhere[:3])}"
    near = registry.closest_match(path[-1][:100], known)
    if near:
        return f"unknown key, did you mean {format_path((*path[:-1], near))!r}? known here: {', '.join(known)}"
    return f"unknown key; remove it, known here: {', '.join(known)}"


def _unknown_option(path: yaml.Path, owner: str, fields: list[Any]) -> str:
    known = [field.alias for field in fields]
    above = (*path[:-2], path[-1])
    if above in schema.all_keys():
        return f"{owner} has no such option; write it as {format_path(above)}"
    near = registry.closest_match(path[-1][:100], known)
    hint = f", did you mean {near!r}?" if near else ";"
    return f"{owner} has no such option{hint} known: {', '.join(known) or 'none'}"
