"""Transformers as different libraries write them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class SharedWidth(nn.Module):
    """The number of channels of a head is computed from that of the input."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class OwnWidth(nn.Module):
    """Heads and their channels are attributes; the number of heads is computed."""

    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(dim, heads * head_dim) for _ in "qkv")
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


class ZeroedKeyBias(nn.Module):
    """Swin v2 (Liu et al., 2022): keys have no bias, queries and keys are normalized."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x):
        b, n, c = x.shape
        bias = self.qkv.bias.clone()
        bias[len(bias) // 3 : 2 * len(bias) // 3].zero_()
        x = F.linear(x, self.qkv.weight, bias)
        q, k, v = x.reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class QueriesAsTheyAre(nn.Module):
    """GCViT (Hatamizadeh et al., 2023): queries come from elsewhere, and no layer makes them."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.kv, self.proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        k, v = self.kv(x).reshape(b, n, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q = x.reshape(b, n, self.heads, self.head_dim).permute(0, 2, 1, 3)
        x = (0.3 * q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class ValuesApart(nn.Module):
    """ConViT (d'Ascoli et al., 2021): values have a layer of their own."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qk, self.v, self.proj = (
            heads,
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x):
        b, n, c = x.shape
        q, k = self.qk(x).reshape(b, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = (0.3 * q @ k.transpose(-2, -1)).softmax(-1)
        v = self.v(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class CrossCovariance(nn.Module):
    """XCiT (El-Nouby et al., 2021): attention between the channels of each head."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        x = weights.softmax(-1) @ v
        return self.proj(x.permute(0, 3, 1, 2).reshape(b, n, c))


class HeadsLast(SharedWidth):
    """NesT (Zhang et al., 2022): the last layer reads the heads of each channel side by side."""

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v
        return self.proj(x.permute(0, 2, 3, 1).reshape(b, n, c))


class RootMeanSquare(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self, attention, dim, norm):
        super().__init__()
        self.norm1, self.attention, self.norm2 = norm(dim), attention, norm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up = nn.Linear(dim, dim)
        self.scale = nn.Parameter(0.5 + torch.rand(dim))
        self.gate = nn.Linear(3 * dim, dim)

    def forward(self, x):
        x = x + self.scale * self.attention(self.norm1(x))
        return x + self.fc2(F.silu(self.gate(self.fc1(self.norm2(x)))) * self.up(x))


class Transformer(nn.Module):
    """On image patches, with a class token and positions."""

    def __init__(self, attention, norm=nn.LayerNorm, dim=16, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 17, dim))
        self.blocks = nn.Sequential(*(Block(attention(dim), dim, norm) for _ in range(depth)))
        self.norm, self.head = norm(dim), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Language(nn.Module):
    """Tokens to logits, with tied embeddings."""

    def __init__(self, dim=16, words=40):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(words, dim), nn.Embedding(12, dim)
        self.block, self.norm = Block(OwnWidth(dim, 4, 6), dim, RootMeanSquare), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.block(x)))


class GroupNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 10)
        self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(1, 24)

    def forward(self, x):
        x = F.relu(self.norm1(self.a(x)))
        return self.out(F.relu(self.norm2(self.b(x))).mean((2, 3)))


# In which the number of channels of a head is that of the input, divided.
DIVIDED = {
    "zeroed_key_bias": ZeroedKeyBias,
    "queries_as_they_are": QueriesAsTheyAre,
    "values_apart": ValuesApart,
    "cross_covariance": CrossCovariance,
    "heads_last": HeadsLast,
}
ATTENTION = {
    "shared_width": lambda: Transformer(lambda dim: SharedWidth(dim, 4)),
    "own_width": lambda: Transformer(lambda dim: OwnWidth(dim, 4, 6), RootMeanSquare),
    "group_norms": GroupNorms,
    **{name: partial(Transformer, partial(attention, heads=2)) for name, attention in DIVIDED.items()},
}
