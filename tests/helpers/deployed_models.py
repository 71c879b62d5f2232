"""Slim models to deploy, and how far another form is from them."""

import torch
from torch import nn

from helpers.networks import init_norms, zero_gates
from prunekit.config import registry
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.slim import slim


def learned(name: str, seed: int, share: float = 0.5, **options) -> tuple[nn.Module, torch.Tensor]:
    """A slim model with odd channel counts and absent branches, and a batch for it; its PReLUs have slopes of all
    kinds."""
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


def gap(model: nn.Module, other: nn.Module, *shape: int) -> float:
    image = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        wanted = model(image)
        return float((other(image) - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
