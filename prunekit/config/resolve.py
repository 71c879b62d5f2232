"""Look up the names in a recipe and check their options against the signatures of the builders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pydantic

from prunekit.config import registry, schema, yaml
from prunekit.config.messages import describe_unknown_option, describe_value, group_by_path
from prunekit.config.overrides import ConfigTree
from prunekit.config.user_module import UserModule
from prunekit.config.yaml import format_path
from prunekit.errors import PrunekitError, RecipeError


def resolve_components(tree: ConfigTree, untrusted: bool) -> None:
    """Check names, options and data roots; fill in default names and options. Errors are added to the tree."""
    for path, table in schema.REGISTRIES.items():
        parent = tree.value if len(path) == 1 else tree.get(path[:-1])
        section = parent.get(path[-1], {}) if isinstance(parent, dict) else None
        if not isinstance(section, dict):
            continue
        if path == ("backbone",) and section.get("file") is not None:
            parent[path[-1]] = _resolve_file(tree, section, untrusted)
            continue
        # A name may be missing only because its text could not be read.
        name = section.get("name", schema.default_name(path) if tree.complete else None)
        if not isinstance(name, str):
            continue
        builders: registry.Registry = getattr(registry, table)
        try:
            build = builders.get(name)
        except PrunekitError as error:
            tree.add_error((*path, "name"), str(error))
            continue
        options = section.get("options", {})
        if isinstance(options, dict):
            owner = f"{builders.kind} {name!r}"
            options = _resolve_options(tree, path, owner, partial(builders.options_of, build), options)
        if path == ("data",):
            _check_roots(tree, name, build, section)
        parent[path[-1]] = {**section, "name": name, "options": options}
    # Last, since a backbone's file may register the task.
    task = tree.get(("task",)) if "task" in tree.value else schema.Recipe.model_fields["task"].default
    if isinstance(task, str) and task not in registry.tasks:
        new = "a task of your own: register_task in a plugin or in backbone.file (see the guide on plugins)"
        tree.add_error(("task",), f"{registry.tasks.unknown(task)}; {new}")


def _resolve_file(tree: ConfigTree, section: dict[str, Any], untrusted: bool) -> dict[str, Any]:
    """Import the backbone's file, record its checksum and check the options."""
    path = ("backbone",)
    name, options = section.get("name"), section.get("options", {})
    if not (isinstance(section["file"], str) and isinstance(name, str)):
        return section
    location = tree.location((*path, "file"))
    try:
        # A path in an override is relative to the current folder.
        module = UserModule.read(section["file"], location.file.parent if location.file else None)
        if module.change:
            raise RecipeError(
                f"{module.change}; restore that version, or set backbone.file={module.path} to use this one"
            )
        if untrusted and location.file:
            module.check_trusted()
        else:
            module.trust()
        build = module.load_function(name)
    except PrunekitError as error:
        tree.add_error((*path, "file"), str(error))
        return section
    if isinstance(options, dict):
        owner = f"backbone {name!r} of {module.path.name}"
        options = _resolve_options(tree, path, owner, partial(registry.backbones.options_of, build), options)
    return {**section, "file": module.pinned_path, "options": options}


def _resolve_options(
    tree: ConfigTree,
    path: yaml.Path,
    owner: str,
    get_parameters: Callable[[], dict[str, inspect.Parameter]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the options with the builder's defaults, as plain values."""
    path = (*path, "options")
    try:
        model = _options_model(get_parameters())
    except Exception as error:  # Evaluating a plugin's annotations may raise anything.
        reason = f"{type(error).__name__}: {error}"
        tree.add_error(path, f"the signature of {owner} cannot be read ({reason}); fix its annotations")
        return options
    resolved = options
    try:
        # Twice: pydantic checks a default only once it is given as a value.
        for _ in range(2):
            resolved = model.model_validate_json(json.dumps(resolved)).model_dump(
                mode="json", by_alias=True, warnings=False
            )
        return resolved
    except pydantic.ValidationError as error:
        for relative, items in group_by_path(error, resolved).items():
            kind, full_path = items[0]["type"], (*path, *relative)
            if kind == "extra_forbidden":
                known = [field.alias for field in model.model_fields.values()]
                tree.add_error(full_path, describe_unknown_option(full_path, owner, known))
            elif kind == "missing":
                if tree.complete:
                    key = format_path(full_path[-1:])
                    tree.add_error(full_path, f"is missing; {owner} requires it, add '{key}: …'")
            elif not relative or relative[0] in options:
                tree.add_error(full_path, describe_value(items))
            else:
                problem = describe_value(items)
                tree.add_error(full_path, f"the default of {owner} is wrong: {problem}; set another value")
    except ValueError as error:
        tree.add_error(
            path, f"a default of {owner} cannot be written as YAML ({error}); use plain values in its builder"
        )
    return options


def _options_model(parameters: dict[str, inspect.Parameter]) -> type[pydantic.BaseModel]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    fields: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.kind in variable:
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        if default is None:
            annotation = annotation | None
        # By alias: options may be called `copy` or `json`, fields of a pydantic model may not.
        fields[f"option_{len(fields)}"] = (annotation, pydantic.Field(default, alias=key))
    extra = "allow" if registry.takes_any_option(parameters) else "forbid"
    config = pydantic.ConfigDict(extra=extra, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return pydantic.create_model("Options", __config__=config, **fields)


def _check_roots(tree: ConfigTree, name: str, build: Callable[..., Any], section: dict[str, Any]) -> None:
    parameters = dict(inspect.signature(build).parameters)
    if registry.takes_any_option(parameters):
        return
    for key in ("root", "val_root", "val_holdout"):
        if key not in parameters and section.get(key) is not None:
            fix = f"remove it (data.{key}=null) or use a data set that reads folders (folder, image_folder)"
            tree.add_error(("data", key), f"data set {name!r} takes no {key}; {fix}")
    required = "root" in parameters and parameters["root"].default is inspect.Parameter.empty
    if required and section.get("root") is None and tree.complete:
        tree.add_error(("data", "root"), f"data set {name!r} reads a folder; set data.root=FOLDER")
