"""Load recipes: YAML files and ``key=value`` overrides in, checked :class:`Recipe` objects out.

Does not import torch before a name is looked up. Two passes, whose errors are reported together: the first checks
values against :mod:`prunekit.config.schema`, the second (:mod:`prunekit.config.resolve`) names and options.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pydantic

from prunekit.config import messages, schema
from prunekit.config.conflicts import find_conflicts
from prunekit.config.overrides import ConfigTree, load_tree
from prunekit.config.resolve import resolve_components
from prunekit.config.schema import Backbone, Checkpoint, Component, Data, Decay, Export, Recipe, Slim, Training
from prunekit.config.yaml import format_path, quote
from prunekit.errors import RecipeError

__all__ = ["Backbone", "Checkpoint", "Component", "Data", "Decay", "Export", "Recipe", "Slim", "Training", "load"]


def load(source: str | Path, overrides: Sequence[str] = (), *, untrusted: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        source: recipe file, or name of a shipped recipe.
        overrides: ``a.b.c=value`` each, with the value in YAML; they replace values of the file and its bases.
        untrusted: whether the file may come from someone else, as in a run folder. A ``backbone.file`` in it is
            imported only if the user trusts it, see :mod:`prunekit.config.user_module`.

    Returns:
        The recipe with all defaults, including those of the builders' options.

    Raises:
        RecipeError: one line per error, ``file:line:column: key: problem; fix``; for an override, its text replaces
            the position.
    """
    tree = load_tree(source, overrides)
    text_errors, tree.errors = tree.errors, []
    _check_schema(tree)
    resolve_components(tree, untrusted)
    # A value that could not be read is None in the tree; that None does not fit is not a second error.
    unreadable = {error.path for error in text_errors}
    value_errors = [e for e in tree.errors if not any(e.path[: n + 1] in unreadable for n in range(len(e.path)))]
    _raise_errors(text_errors + value_errors)
    _make_paths_absolute(tree)
    recipe = Recipe.model_validate_json(json.dumps(tree.value))
    tree.errors = []
    for path, message in find_conflicts(recipe):
        tree.add_error(path, message)
    _raise_errors(tree.errors)
    return recipe


def _raise_errors(errors: list) -> None:
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(map(str, sorted(errors)))))


def _make_paths_absolute(tree: ConfigTree) -> None:
    """Let a recorded recipe name the same folders from everywhere; a name that is no folder may mean anything."""
    for path in (*schema.PATHS, ("data", "cache")):
        text = tree.get(path)
        is_new = path == ("data", "cache") and text not in ("auto", "none")
        if isinstance(text, str) and (is_new or os.path.exists(os.path.expanduser(text))):
            # YAML cannot hold a name that is not UTF-8.
            with contextlib.suppress(UnicodeEncodeError):
                schema.real_path(text).encode()
                tree.get(path[:-1])[path[-1]] = schema.real_path(text)


def _check_schema(tree: ConfigTree) -> None:
    """Check keys, types and ranges."""
    try:
        Recipe.model_validate_json(json.dumps(tree.value))
    except pydantic.ValidationError as error:
        for path, items in messages.group_by_path(error, tree.value).items():
            kind = items[0]["type"]
            if kind == "extra_forbidden":
                tree.add_error(path, messages.describe_unknown_key(path))
            elif kind == "model_type" and "name" in schema.get_section(path).model_fields:
                name_key = format_path((*path, "name"))
                tree.add_error(path, f"{quote(items[0]['input'])} is not a mapping; set {name_key} instead")
            elif kind != "missing":
                tree.add_error(path, messages.describe_value(items, path))
            elif tree.complete:
                tree.add_error(path, messages.describe_missing_key(path))
