"""Maps a module name to its multi-scale layer and branch."""

from __future__ import annotations

from torch import nn

from prunekit.layers.optional import MultiScaleLayer, OptionalModules


def layer_of(model: nn.Module, name: str) -> tuple[str, int | None]:
    """Return the multi-scale layer and the branch that contain module ``name``, or (name, None)."""
    parts = name.split(".")
    module, layer = model, None
    for depth, part in enumerate(parts):
        if layer and isinstance(module, OptionalModules):
            # A path i→j belongs to its output branch.
            return layer, int(part.rpartition("to")[2])
        module = getattr(module, part)
        if isinstance(module, MultiScaleLayer):
            layer = ".".join(parts[: depth + 1])
    return name, None
