"""Small networks for tests, with initialized norms and dead gates."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.backbones.csnet import csnet
from prunekit.layers import layer_of
from prunekit.pruning.graph.groups import find_groups

BLOCKS = (3, 2, 2, 2)  # of a small CSNet


class Row(nn.Module):
    """Convolution, norm, activation, depthwise convolution, norm and a reader: gates in series."""

    def __init__(self, padding: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=padding, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.silu(self.bn2(self.depthwise(x)))
        return self.out(F.relu(self.bn3(self.conv2(x))))


class Residual(nn.Module):
    """Two norms whose outputs are added, then a flatten and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1, bias=False)
        self.last_bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.bn(self.conv(x)))
        x = F.relu(self.last_bn(self.last(x)))
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


class Concat(nn.Module):
    """Two convolutions that are concatenated and share a norm."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.b = nn.Conv2d(3, 3, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1))))


class Shared(nn.Module):
    """One convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1, bias=False)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.out(F.relu(self.twice(F.relu(self.twice(x)))))


def init_norms(model: nn.Module, seed: int = 0, size: int = 32, beta: float = 0.1) -> torch.Tensor:
    """Give the norms running statistics, γ and β; return a batch (4, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(4, 3, size, size, generator=generator) for _ in range(20)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1 - (1 - norm.momentum) ** 5  # the statistics after 20 batches, from every fifth one
    model.train()
    with torch.no_grad():
        for batch in batches[4::5]:
            model(batch)
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
            if module.affine:
                module.bias.normal_(0, beta, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
    model.eval()
    return torch.randn(4, 3, size, size, generator=generator)


def zero_gates(model: nn.Module, groups: list, share: float, seed: int = 0, whole: float = 0.0) -> dict[str, list[int]]:
    """Set all gates of a random share of channels to zero, and a whole coarser branch with probability ``whole``.

    One channel of the finest branch of each layer is kept alive, so that the network is not dead.
    """
    generator = torch.Generator().manual_seed(seed)
    killed = {}
    with torch.no_grad():
        for group in groups:
            if group.reason is not None:
                continue
            dead = torch.rand(group.channels, generator=generator) < share
            whole_group = torch.rand((), generator=generator) < whole
            if layer_of(model, group.producers[0])[1]:
                dead |= whole_group
            else:
                dead[torch.randint(group.channels, (), generator=generator)] = False
            killed[group.id] = dead.nonzero().flatten().tolist()
            for gate in group.gates:
                model.get_submodule(gate.norm).weight[gate.slice[0] : gate.slice[1]][dead] = 0
    return killed


def small_csnet() -> nn.Module:
    """A CSNet with a block of each kind."""
    return csnet(10, blocks=BLOCKS)


def csnet_with_dead_gates(seed: int, share: float = 0.5, whole: float = 0.1, size: int = 32):
    """A small CSNet with a share of dead gates and some dead branches, its groups and a batch."""
    prepared = _csnet_with_dead_gates(seed, share, whole, size)
    # What the test draws next must not depend on whether another test has prepared the same network.
    torch.manual_seed(seed)
    return copy.deepcopy(prepared)


@functools.cache
def _csnet_with_dead_gates(seed: int, share: float, whole: float, size: int):
    torch.manual_seed(seed)
    model = small_csnet()
    example = init_norms(model, seed, size)
    groups = find_groups(model, example)
    zero_gates(model, groups, share, seed, whole)
    return model, groups, example


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
