"""Models of timm and of torchvision, by name, where these are installed: ``timm/resnet18``, ``torchvision/resnet18``.

Their options are those of the library's own builders. No weights are downloaded unless an option asks for them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from prunekit.config.registry import Entry, backbones, closest_match, describe_error
from prunekit.errors import PluginError, RecipeError


@backbones.register_family("timm")
def timm_model(name: str) -> Entry:
    """Any model of timm; options: pretrained=False, num_classes=… and its others.

    Raises:
        PluginError: timm is not installed, or does not import.
        RecipeError: it has no model of this name.
    """
    timm = _library("timm", "install it with: pip install timm")
    # Behind a dot stand the weights; a name with a colon is looked up on a hub, where no list is.
    if ":" not in name:
        _known("timm", name.partition(".")[0], timm.list_models())

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **options)

    return _entry("timm", name, build)


@backbones.register_family("torchvision")
def torchvision_model(name: str) -> Entry:
    """Any model of torchvision; options: weights=None, num_classes=… and its others.

    Raises:
        PluginError: torchvision is not installed, or does not import.
        RecipeError: it has no model of this name.
    """
    build_of_torch = "install the build that belongs to your torch, from where that came (see pytorch.org)"
    models = _library("torchvision.models", f"{build_of_torch}: pip install torchvision")
    _known("torchvision", name, models.list_models())

    def build(weights: str | None = None, **options: Any) -> nn.Module:
        # The segmentation and detection models would download their backbone's weights by default.
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options = {"weights_backbone": None, **options}
        return models.get_model(name, weights=weights, **options)

    return _entry("torchvision", name, build)


def _library(module: str, mend: str) -> ModuleType:
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise PluginError(f"{name} is not installed; {mend}") from error
        raise PluginError(f"{name} does not import ({describe_error(error)}); {mend}") from error
    except Exception as error:  # A build for another torch fails with whatever its operators raise.
        raise PluginError(f"{name} does not import ({describe_error(error)}); {mend}") from error


def _known(library: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = closest_match(name, list(known))
        hint = f", did you mean '{library}/{near}'?" if near else ";"
        raise RecipeError(f"unknown backbone '{library}/{name}'{hint} {library} has {len(known)} models")


def _entry(library: str, name: str, build: Callable[..., nn.Module]) -> Entry:
    return Entry(f"{library}/{name}", build, library, version(library))


def version(distribution: str) -> str | None:
    """The version of an installed distribution, else None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
