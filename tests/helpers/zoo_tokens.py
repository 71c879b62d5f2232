"""Small networks that compute on tokens or channels-last maps, linear layers along the last of several axes:
(N, 3, 32, 32) → logits (N, 10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Dosovitskiy et al., ICLR 2021: patches, a class token, positions, and two pre-norm blocks."""

    def __init__(self, width: int = 8, hidden: int = 20, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.attentions = nn.ModuleList([Attention(width, heads) for _ in range(2)])
        self.mlps = nn.ModuleList([MLP(width, hidden) for _ in range(2)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for index, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(x[:, 0])


class ConvNeXt(nn.Module):
    """Liu et al., CVPR 2022: a depthwise convolution, then channels-last norm, MLP and layer scale."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.depthwise = nn.ModuleList([nn.Conv2d(width, width, 7, padding=3, groups=width) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.mlps = nn.ModuleList([MLP(width, 3 * width) for _ in range(2)])
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(width)) for _ in range(2)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for depthwise, norm, mlp, scale in zip(self.depthwise, self.norms, self.mlps, self.scales, strict=True):
            y = norm(depthwise(x).permute(0, 2, 3, 1))
            x = x + (mlp(y) * scale).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Mixer(nn.Module):
    """Tolstikhin et al., NeurIPS 2021: MLPs over the tokens and over the features of each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.tokens, self.features = MLP(16, 12), MLP(width, 20)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norms[0](x).transpose(-1, -2)).transpose(1, 2)
        x = x + self.features(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


class NormedTokens(nn.Module):
    """Linear layers with BatchNorm over all tokens, as in LeViT (Graham et al., ICCV 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 10, 8, stride=8), nn.BatchNorm2d(10)
        self.up, self.up_norm = nn.Linear(10, 24, bias=False), nn.BatchNorm1d(24)
        self.down, self.down_norm = nn.Linear(24, 10, bias=False), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        y = self.up(x)
        y = F.hardswish(self.up_norm(y.flatten(0, 1)).reshape_as(y))
        y = self.down(y)
        x = x + self.down_norm(y.flatten(0, 1)).view(*y.shape)
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """PyTorch's own encoder layer, which computes with the weights of its linear layers itself in eval mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(width, 2, 20, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


TOKENS = {
    "vit": ViT,
    "convnext": ConvNeXt,
    "mixer": Mixer,
    "normed_tokens": NormedTokens,
    "transformer_encoder": Encoder,
}
