"""ViT for small images (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021).

The mean over the tokens replaces the class token (Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.registry import register_backbone


class Attention(nn.Module):
    """Multi-head self-attention: (N, tokens, width) to the same shape."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        x = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each after a LayerNorm and with a shortcut: (N, tokens, width) to the same shape."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, blocks, the mean over the tokens and a linear layer: (N, 3, size, size) to logits (N, classes)."""

    def __init__(self, depth: int, width: int, heads: int, hidden: int, patch: int, size: int, classes: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.norm(self.blocks(x)).mean(1))


@register_backbone("vit")
def vit(
    depth: int = 6,
    width: int = 96,
    heads: int = 4,
    hidden: int | None = None,
    patch: int = 4,
    size: int = 32,
    classes: int = 10,
) -> nn.Module:
    """ViT for images of one size: width is that of the tokens, hidden (default 4 · width) that of the perceptrons."""
    hidden = 4 * width if hidden is None else hidden
    numbers = {"depth": depth, "width": width, "heads": heads, "hidden": hidden, "patch": patch, "classes": classes}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if width % heads:
        raise ValueError(f"width={width} must be a multiple of heads; set it to {heads * max(1, round(width / heads))}")
    if size < patch or size % patch:
        raise ValueError(f"size={size} must be a multiple of patch; set it to {patch * max(1, round(size / patch))}")
    return ViT(depth, width, heads, hidden, patch, size, classes)
