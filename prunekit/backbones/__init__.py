"""Backbones: functions that build a dense model. May import layers and config."""

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
        name: a registered backbone, ``timm/NAME``, ``torchvision/NAME``, ``transformers/TYPE``, or a function in
            ``file``.
        options: keyword arguments of the builder.
        file: a Python file, whose content is compared with the checksum in ``FILE#sha256=…``.

    Raises:
        RecipeError: the name is unknown, or the options are invalid.
        PluginError: the file fails to import or has no such function; the builder fails or returns no module.
    """
    if file is None:
        entry = registry.backbones.entry(name)
        function, source = entry.build, "" if entry.origin == "prunekit" else f" of {entry.origin}"
    else:
        try:
            module = UserModule.read(file)
            function, source = module.load_function(name), f" of {module.path}"
        except (RecipeError, PluginError) as error:
            raise type(error)(f"backbone.file: {error}") from error
        if module.change:
            message = f"backbone.file: {module.change}; models trained with the earlier version may not fit"
            warnings.warn(message, PrunekitWarning, stacklevel=2)
    options = options or {}
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise RecipeError(f"backbone.options: {name}{source}: {error}") from error
    try:
        model = function(**options)
    except PrunekitError:
        raise
    except ValueError as error:
        raise RecipeError(f"backbone.options: {name}{source}: {error}") from error
    except Exception as error:
        raise PluginError(
            f"backbone {name!r}{source} cannot be built with {options} ({registry.describe_error(error)}); "
            "change its options or fix its builder"
        ) from error
    if not isinstance(model, nn.Module):
        raise PluginError(
            f"backbone {name!r}{source} returned {type(model).__name__}, not a torch.nn.Module; return the model"
        )
    return model
