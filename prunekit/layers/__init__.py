"""Multi-scale layers made of ordinary modules, so that tracers, counters and exporters need no special case."""

from prunekit.layers.blocks import FusionHead, InLayerBlock, NormAct
from prunekit.layers.goctconv import GOctConv, branch_size, split_channels
from prunekit.layers.module_names import layer_of
from prunekit.layers.optional import DepthwiseModules, MultiScaleLayer, OptionalModules

__all__ = [
    "DepthwiseModules",
    "FusionHead",
    "GOctConv",
    "InLayerBlock",
    "MultiScaleLayer",
    "NormAct",
    "OptionalModules",
    "branch_size",
    "layer_of",
    "split_channels",
]
