"""The axes of a module's tensors that carry channels."""

from __future__ import annotations

from torch import Tensor, nn

from prunekit.layers import DepthwiseModules

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def conv_groups(model: nn.Module, name: str) -> int:
    """Return the number of groups of a grouped convolution; 1 for depthwise convolutions and all other modules."""
    module = model.get_submodule(name)
    groups = getattr(module, "groups", 1) if isinstance(module, CONVS + TRANSPOSED) else 1
    return 1 if groups == 1 or is_channelwise(model, name) else groups


def is_channelwise(model: nn.Module, name: str) -> bool:
    """Return whether a module reads each channel alone: a norm, a PReLU or a depthwise convolution."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or is_depthwise(module):
        return True
    return isinstance(model.get_submodule(name.rpartition(".")[0]), DepthwiseModules)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution of each channel alone, which may have several outputs for it."""
    if isinstance(module, TRANSPOSED) and module.in_channels != module.out_channels:
        return False
    return isinstance(module, CONVS + TRANSPOSED) and 1 < module.groups == module.in_channels


def axis_length(module: nn.Module, tensor: str, axis: int) -> int:
    """Return the length of an axis; for the input axis of a grouped convolution, the total over its groups."""
    length = getattr(module, tensor).shape[axis]
    grouped = tensor == "weight" and axis == 1 and isinstance(module, CONVS)
    return length * module.groups if grouped else length


def output_axis(module: nn.Module) -> int:
    """Return the axis of a module's weight that carries its output channels."""
    return 1 if isinstance(module, TRANSPOSED) else 0


def channel_tensors(module: nn.Module) -> list[str]:
    """Return the names of the tensors that have an entry for each output channel of a module."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if isinstance(getattr(module, name, None), Tensor)]
