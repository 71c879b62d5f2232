"""Backbones: functions that build a dense model. A recipe names a registered one, a model of another library, or a
function in a user's file."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import nn

from prunekit.config import registry
from prunekit.config.user_module import UserModule
from prunekit.errors import PluginError, PrunekitError, PrunekitWarning, RecipeError


def build(name: str, options: dict[str, Any] | None = None, file: str | None = None) -> nn.Module:
    """Build the dense model that a recipe names.

    Args:
        name: a registered backbone, ``timm/NAME``, ``torchvision/NAME``, or the function of this name in ``file``.
        options: its keyword arguments.
        file: a Python file; with ``#sha256=…`` behind it, there is a warning where the file has another content.

    Raises:
        RecipeError: the name is not known, or the builder refuses its options.
        PluginError: the file fails to import or has no such function; the builder fails, or returns no module.
    """
    if file is None:
        entry = registry.backbones.entry(name)
        function, whose = entry.build, "" if entry.origin == "prunekit" else f" of {entry.origin}"
    else:
        function, whose = _from_file(file, name)
    options = options or {}
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise RecipeError(f"backbone.options: {name}{whose}: {error}") from error
    try:
        model = function(**options)
    except PrunekitError:
        raise
    except ValueError as error:
        raise RecipeError(f"backbone.options: {name}{whose}: {error}") from error
    except Exception as error:
        raise PluginError(
            f"backbone {name!r}{whose} cannot be built with {options} ({registry.describe_error(error)}); "
            "give other options, or mend its builder"
        ) from error
    if not isinstance(model, nn.Module):
        raise PluginError(
            f"backbone {name!r}{whose} returned {type(model).__name__}, not a torch.nn.Module; return the model"
        )
    return model


def _from_file(text: str, name: str) -> tuple[Any, str]:
    try:
        source = UserModule.read(text)
        function = source.load_function(name)
    except (RecipeError, PluginError) as error:
        raise type(error)(f"backbone.file: {error}") from error
    if source.change:
        message = f"backbone.file: {source.change}; what was trained with it may mean something else now"
        warnings.warn(message, PrunekitWarning, stacklevel=3)
    return function, f" of {source.path}"
