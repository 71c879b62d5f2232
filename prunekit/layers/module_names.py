"""Where a module stands: in which layer, and in which of its branches."""

from __future__ import annotations

from torch import nn

from prunekit.layers.optional import MultiScaleLayer, OptionalModules


def layer_of(model: nn.Module, name: str) -> tuple[str, int | None]:
    """The multi-scale layer and the branch of a module of ``model``, or (the name, None) where it is in none."""
    parts = name.split(".")
    module, layer = model, None
    for depth, part in enumerate(parts):
        if layer and isinstance(module, OptionalModules):
            # A path i→j belongs to the branch that it makes.
            return layer, int(part.rpartition("to")[2])
        module = getattr(module, part)
        if isinstance(module, MultiScaleLayer):
            layer = ".".join(parts[: depth + 1])
    return name, None
