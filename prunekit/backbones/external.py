"""Models of other libraries, if installed: ``timm/resnet18``, ``torchvision/resnet18``, ``transformers/vit``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from prunekit.config.registry import Entry, backbones, describe_error
from prunekit.errors import PluginError, RecipeError
from prunekit.utils.environment import package_version
from prunekit.utils.text import closest_match


@backbones.register_family("timm")
def timm_model(name: str) -> Entry:
    """Any model of timm; options: pretrained=False, num_classes and those of the model."""
    timm = _import_library("timm", "install it with: pip install timm")
    # NAME.WEIGHTS; names with a colon are looked up on a hub, which has no list.
    if ":" not in name:
        _check_known("timm", name.partition(".")[0], timm.list_models())

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, **options)

    return Entry(f"timm/{name}", build, "timm", package_version("timm"))


@backbones.register_family("torchvision")
def torchvision_model(name: str) -> Entry:
    """Any model of torchvision; options: weights=None, num_classes and those of the model."""
    fix = "install the build for your torch from the same source (see pytorch.org): pip install torchvision"
    models = _import_library("torchvision.models", fix)
    _check_known("torchvision", name, models.list_models())

    def build(weights: str | None = None, **options: Any) -> nn.Module:
        # Segmentation and detection models download the weights of their backbone by default.
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options = {"weights_backbone": None, **options}
        return models.get_model(name, weights=weights, **options)

    return Entry(f"torchvision/{name}", build, "torchvision", package_version("torchvision"))


@backbones.register_family("transformers")
def transformers_model(name: str) -> Entry:
    """An image classifier of transformers; options: those of its configuration, such as num_labels."""
    library = _import_library("transformers", "install it with: pip install transformers")
    known = _import_library("transformers.models.auto.modeling_auto", "install another version of it")
    _check_known("transformers", name, list(known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES))

    def build(**options: Any) -> nn.Module:
        config = library.AutoConfig.for_model(name, **options)
        return Logits(library.AutoModelForImageClassification.from_config(config))

    return Entry(f"transformers/{name}", build, "transformers", package_version("transformers"))


class Logits(nn.Module):
    """A classifier of transformers that takes images, (N, C, H, W), and returns its logits, (N, classes), alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _import_library(module: str, fix: str) -> ModuleType:
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a build for another torch may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise PluginError(f"{name} is not installed; {fix}") from error
        raise PluginError(f"{name} fails to import ({describe_error(error)}); {fix}") from error


def _check_known(library: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = closest_match(name, list(known))
        hint = f", did you mean '{library}/{near}'?" if near else ";"
        raise RecipeError(f"unknown backbone '{library}/{name}'{hint} {library} has {len(known)} models")
