"""Ordinary networks that between them hold every call that octavize rewrites, and some that it does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from helpers.networks import init_norms

EXAMPLE = torch.randn(2, 3, 20, 20)


def unit(inputs, outputs, kernel=3, stride=1, bias=False, act=nn.ReLU, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class Plain(nn.Module):
    """VGG: convolutions with bias, poolings that round down and up, dropout, the head behind a mean."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            unit(3, 6, bias=True),
            unit(6, 8, bias=True),
            nn.MaxPool2d(2),
            unit(8, 10, bias=True),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Dropout(0.1),
            unit(10, 12, 1),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(torch.flatten(self.features(x), 1))


class Residual(nn.Module):
    """ResNet's stem of 7×7 and max-pooling, then a basic and a bottleneck block; in-place ReLUs used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a1, self.a2 = unit(8, 8, act=nn.Identity), unit(8, 8, act=nn.Identity)
        self.b1, self.b2 = unit(8, 6, 1, act=nn.PReLU), unit(6, 6, 3, 2, act=lambda: nn.PReLU(6))
        self.b3, self.down = unit(6, 12, 1, act=nn.Identity), unit(8, 12, 1, 2, act=nn.Identity)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        y = self.a2(self.relu(self.a1(x)))
        y += x
        x = self.relu(y)
        x = F.relu(self.b3(self.b2(self.b1(x))) + self.down(x), inplace=True)
        return self.head(x.mean((2, 3)))


class PreActivation(nn.Module):
    """A stream of sums, each behind a norm of its own; a map comes out."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12) for _ in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(12, 12, k, padding=k // 2, bias=False) for k in (3, 1)])
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.add(x, conv(F.leaky_relu(norm(x), 0.1)))
        return self.out(F.silu(self.norms[-1](x)) * 0.5)


class Mobile(nn.Module):
    """MobileNetV2: expansion, depthwise with a stride, projection, a shortcut, functional dropout and pooling."""

    def __init__(self):
        super().__init__()
        self.stem = unit(3, 6, act=nn.ReLU6)
        self.one = nn.Sequential(
            unit(6, 12, 1, act=nn.ReLU6),
            unit(12, 12, 3, 2, act=nn.ReLU6, groups=12, bias=True),
            unit(12, 8, 1, act=nn.Identity),
        )
        self.two = nn.Sequential(
            unit(8, 16, 1, act=nn.Hardswish),
            unit(16, 16, 3, act=nn.Hardswish, groups=16),
            unit(16, 8, 1, act=nn.Identity),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.one(self.stem(x))
        x = x.add(self.two(x))
        x = F.dropout(F.max_pool2d(1 + x, 3, 1, 1), 0.2, self.training)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Ends(nn.Module):
    """A concatenation, a convolution of groups, a dilated one, one without padding, a product."""

    def __init__(self):
        super().__init__()
        self.stem = unit(3, 8)
        self.a, self.b = unit(8, 6), unit(8, 6, 1)
        self.after_cat = unit(12, 8, 1)
        self.grouped = unit(8, 8, groups=2)
        self.after_groups = unit(8, 8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.after_dilated = unit(8, 8)
        self.valid = nn.Conv2d(8, 8, 3, bias=False)
        self.after_valid = unit(8, 8)
        self.biased = nn.Conv2d(8, 8, 1)
        self.squeeze, self.last = nn.Linear(8, 8), unit(8, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = self.grouped(self.after_cat(torch.cat([self.a(x), self.b(x)], 1)))
        x = self.after_dilated(self.dilated(self.after_groups(x)))
        x = self.biased(self.after_valid(self.valid(x)))
        x = self.last(x)
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3))))[:, :, None, None]
        return self.out(x)


class Net(nn.Module):
    """A stem, a layer, something in the middle, a layer, the mean, a linear layer."""

    def __init__(self, middle, **parts):
        super().__init__()
        self.stem, self.one, self.two, self.head = unit(3, 4), unit(4, 6), unit(6, 6), nn.Linear(6, 3)
        self.middle = middle
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        x = self.two(self.middle(self, self.one(self.stem(x))))
        return self.head(x.mean([-1, -2], keepdim=True).flatten(1))


NETWORKS = {net.__name__: net for net in (Plain, Residual, PreActivation, Mobile, Ends)}
LEAST = {"Plain": 2, "Ends": 3}  # the smallest side that the network takes


def settled(net, seed=0, size=20):
    torch.manual_seed(seed)
    model = net()
    init_norms(model, seed, size)
    return model


def images(size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
