"""Containers whose entries may be absent, and the layers that hold them.

PyTorch's convolutions and norms fail on zero channels. So a branch without channels is a missing entry, and slimming
may delete entries of these containers (and of no others).
"""

from __future__ import annotations

from torch import nn


class OptionalModules(nn.ModuleDict):
    """Modules of which any may be missing: whoever holds them treats a missing one as one of zero channels."""

    def take(self, key: object) -> nn.Module | None:
        """The entry of this key, or None where it is missing."""
        return self._modules.get(str(key))


class MultiScaleLayer(nn.Module):
    """A layer that has branches: what reports count as one layer, branch by branch."""


class DepthwiseModules(OptionalModules):
    """Depthwise convolutions, one a branch.

    With one channel left, a depthwise convolution has the same attributes as an ordinary one; standing in here says
    which.
    """
