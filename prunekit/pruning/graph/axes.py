"""The axes of a module's tensors on which channels stand."""

from __future__ import annotations

from torch import nn

from prunekit.layers import DepthwiseModules
from prunekit.pruning.graph.trace import CONVS, TRANSPOSED


def conv_groups(model: nn.Module, name: str) -> int:
    """In how many groups a convolution connects its channels; 1 for what connects all, and for a depthwise one, which
    connects none."""
    module = model.get_submodule(name)
    groups = getattr(module, "groups", 1) if isinstance(module, CONVS + TRANSPOSED) else 1
    return 1 if groups == 1 or is_channelwise(model, name) else groups


def is_channelwise(model: nn.Module, name: str) -> bool:
    """Whether a module hands its channels on one by one (a norm, a PReLU, a depthwise convolution), and makes none."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() < 2:
        return True
    parent = model.get_submodule(name.rpartition(".")[0])
    groups = getattr(module, "groups", 1)
    return isinstance(parent, DepthwiseModules) or (groups > 1 and groups == module.in_channels == module.out_channels)


def axis_length(module: nn.Module, tensor: str, axis: int) -> int:
    """How many entries an axis has; along the input axis of a convolution with groups, those of all groups."""
    length = getattr(module, tensor).shape[axis]
    grouped = tensor == "weight" and axis == 1 and isinstance(module, CONVS)
    return length * module.groups if grouped else length


def output_axis(module: nn.Module) -> int:
    """The axis of a weight along which the output's channels stand."""
    return 1 if isinstance(module, TRANSPOSED) else 0
