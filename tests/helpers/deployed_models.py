"""Pruned models to deploy, and the comparison of their outputs."""

import copy
import functools

import torch
from torch import nn

from helpers.networks import BLOCKS, init_norms, zero_gates
from prunekit.config import registry
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.slim import slim


def pruned_model(name: str, seed: int, share: float = 0.5, **options) -> tuple[nn.Module, torch.Tensor]:
    """A slim model with odd channel counts, absent branches and all kinds of PReLU slopes; and a batch for it."""
    if name == "csnet":
        options = {"blocks": BLOCKS, **options}
    return copy.deepcopy(_pruned_model(name, seed, share, **options))


@functools.cache
def _pruned_model(name: str, seed: int, share: float, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model = registry.backbones.get(name)(**options)
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 1.2 if seed % 2 else 0.9)
    example = init_norms(model, seed, 32)
    groups = find_groups(model, example)
    zero_gates(model, groups, share, whole=0.3)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    return small.eval(), example


def settled(model: nn.Module, size: int = 16) -> tuple[nn.Module, torch.Tensor]:
    """A model in eval mode whose norms have statistics, and a batch for it."""
    torch.manual_seed(0)
    example = init_norms(model, 0, size)
    return model.eval(), example


def relative_difference(model: nn.Module, other: nn.Module, *shape: int) -> float:
    """The largest difference of the outputs on a random input, relative to the largest output if that is above 1."""
    image = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = model(image)
        return float((other(image) - expected).abs().max()) / max(1.0, float(expected.abs().max()))
