"""Networks that multiply activations, or with bare parameters, in all forms: (N, 3, 32, 32) or tokens → (N, 10)."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo_attention import ATTENTION, Language
from helpers.zoo_tokens import TOKENS


class Windows(nn.Module):
    """Attention in windows, which are as many images more, with position biases; then patches are merged (Swin)."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.patches, self.norm, self.heads = nn.Conv2d(3, dim, 4, 4), nn.LayerNorm(dim), heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(heads, 16, 16))
        self.merge, self.head = nn.Linear(4 * dim, 20, bias=False), nn.Linear(20, 10)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        b, c = len(x), x.shape[-1]
        y = self.norm(x).view(b, 2, 4, 2, 4, c).transpose(2, 3).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = (0.3 * q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 16, c))
        x = x + y.view(b, 2, 2, 4, 4, c).transpose(2, 3).reshape(b, 8, 8, c)
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.head(self.merge(x).mean((1, 2)))


class Heads(nn.Module):
    """Attention of image patches by a function of queries, keys and values, (N, L, C) each."""

    def __init__(self, attend, widths=(16, 16, 16)):
        super().__init__()
        self.patches, self.attend, self.head_dim = nn.Conv2d(3, 16, 8, 8), attend, 4
        self.q, self.k, self.v = (nn.Linear(16, width) for width in widths)
        self.out, self.bias = nn.Linear(widths[0], 10), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.out(self.attend(self, self.q(x), self.k(x), self.v(x)).mean(1))


def einsum(net, *tensors):
    q, k, v = (x.unflatten(-1, (-1, net.head_dim)) for x in tensors)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def baddbmm(net, q, k, v):
    bias = net.bias.expand(len(q), -1, -1)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1), v)


def grouped_queries(net, *tensors):
    q, k, v = (x.unflatten(-1, (-1, net.head_dim)).transpose(1, 2) for x in tensors)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.patches, self.out, self.batch_first = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 10), batch_first
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.out(x.mean(1))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.rows = nn.Parameter(torch.randn(12, 3, 3, 3)), nn.Parameter(torch.randn(20, 12))
        self.columns, self.bias = nn.Parameter(torch.randn(20, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, stride=2)).mean((2, 3))
        return torch.addmm(self.bias, F.relu(F.linear(x, self.rows)), self.columns)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up2 = nn.Conv2d(3, 8, 3, 2, padding=1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.up1, self.up3 = nn.ConvTranspose1d(6, 10, 3, 2), nn.ConvTranspose3d(10, 4, 2, 2)
        self.out = nn.Linear(4, 10)

    def forward(self, x):
        x = F.relu(self.up2(F.relu(self.conv(x)))).mean(3)
        x = F.relu(self.up1(x))[:, :, :27].unflatten(2, (3, 3, 3))
        return self.out(F.relu(self.up3(x)).mean((2, 3, 4)))


class PositionTable(nn.Module):
    """Scales of the channels are computed from a constant table, once for all images (Swin v2)."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 10)
        self.hidden, self.scales = nn.Linear(2, 6), nn.Linear(6, 12)
        self.register_buffer("table", torch.rand(16, 2))

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.out((x * self.scales(F.relu(self.hidden(self.table)))).mean(1))


PRODUCTS = {
    **ATTENTION,
    "language": Language,
    **{name: TOKENS[name] for name in ("vit", "mixer")},
    "windows": Windows,
    "einsum": lambda: Heads(einsum),
    "baddbmm": lambda: Heads(baddbmm),
    "grouped_queries": lambda: Heads(grouped_queries, (24, 8, 8)),
    "encoder": lambda: Encoder(batch_first=True),
    "encoder_of_sequences": lambda: Encoder(batch_first=False),
    "bare": Bare,
    "transposed": Transposed,
    "position_table": PositionTable,
}


def example_of(name):
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randint(40, (4, 12), generator=draw) if name == "language" else torch.randn(4, 3, 32, 32, generator=draw)
    )
