"""Containers whose entries may be absent, since PyTorch's convolutions and norms fail on zero channels.

Pruning may delete entries of these containers and of no others.
"""

from __future__ import annotations

from torch import nn


class OptionalModules(nn.ModuleDict):
    """A ModuleDict whose missing entries count as modules with zero channels."""

    def take(self, key: object) -> nn.Module | None:
        """Return the entry for ``key``, or None if it is missing."""
        return self._modules.get(str(key))


class MultiScaleLayer(nn.Module):
    """Base of layers with branches; reports show such a layer as one row per branch."""


class DepthwiseModules(OptionalModules):
    """Depthwise convolutions, one per branch; with one channel left they have the attributes of ordinary ones."""
