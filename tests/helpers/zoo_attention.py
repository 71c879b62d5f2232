"""Transformers as different libraries write them."""

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


ATTENTION = {
    "shared_width": lambda: Transformer(lambda dim: SharedWidth(dim, 4)),
    "own_width": lambda: Transformer(lambda dim: OwnWidth(dim, 4, 6), RootMeanSquare),
    "group_norms": GroupNorms,
}
