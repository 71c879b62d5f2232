"""Backbones: functions that build a dense model. A recipe names a registered one, or a function in a user's file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from prunekit import registry
from prunekit.errors import PluginError, RecipeError


def build(name: str, options: dict[str, Any] | None = None, file: str | None = None) -> nn.Module:
    """Build the dense model that a recipe names.

    Args:
        name: a registered backbone, or the function of this name in ``file``.
        options: its keyword arguments.
        file: a Python file.

    Raises:
        RecipeError: the name is not known, or the builder refuses its options.
        PluginError: the file fails to import, has no such function, or it returns no module.
    """
    function = registry.backbones.get(name) if file is None else _from_file(Path(file).expanduser(), name)
    try:
        model = function(**(options or {}))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"backbone.options: {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise PluginError(f"backbone {name!r} returned {type(model).__name__}, not a torch.nn.Module; return the model")
    return model


def _from_file(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise RecipeError(f"backbone.file: {path} is not there; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"backbone.file: {path} is no Python file; its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PluginError(f"backbone.file: {path} fails to import ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = registry.nearest(name, [key for key, value in vars(module).items() if callable(value)])
        raise PluginError(
            f"backbone.file: {path} has no function {name!r}" + (f"; did you mean {known!r}?" if known else "")
        )
    return function
