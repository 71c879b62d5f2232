"""Networks of random layers on maps and tokens: (N, 3, 32, 32) → (N, 5)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXIS = {"maps": 1, "channels last": -1, "tokens": -1, "sequence": 1}  # of the channels
POSITIONS = {"maps": (2, 3), "channels last": (1, 2), "tokens": (1,), "sequence": (2,)}
# Layout → operations that only it has. The other axis of tokens has 64 entries.
OWN = {
    "maps": ("conv", "conv", "batch_norm", "instance_norm", "group_norm", "depthwise", "pool", "last", "join"),
    "channels last": ("linear", "linear", "layer_norm", "first", "merge"),
    "tokens": ("linear", "mlp", "layer_norm", "token_norm", "attention", "joint_attention", "swap"),
    "sequence": ("conv", "batch_norm", "mix", "swap", "split"),
}
ANYWHERE = ("activation", "save", "add", "multiply", "concatenate", "again", "gate", "rotate")


class Attention(nn.Module):
    """Two heads, with a linear layer each for queries, keys and values."""

    def __init__(self, width: int, inner: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.output = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if self.fused:
            heads = F.scaled_dot_product_attention(q, k, v)
        else:
            heads = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return x + self.output(heads.transpose(1, 2).flatten(2))


class JointAttention(nn.Module):
    """Two heads, with one linear layer for queries, keys and values."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.joint, self.output = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.joint(x).reshape(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        return x + self.output(heads.transpose(1, 2).reshape(batch, length, -1))


class RandomNetwork(nn.Module):
    """Draws its layers at construction; ``steps`` are functions of the network, the current tensor and saved ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.layout, self.width = random.Random(seed), "maps", 8
        self.layers, self.steps = nn.ModuleList(), []
        self.saved: list[tuple[str, int]] = []
        self.stem = nn.Conv2d(3, self.width, 4, stride=4)
        for _ in range(self.random.randint(4, 14)):
            getattr(self, f"_{self.random.choice(OWN[self.layout] + ANYWHERE)}")()
        self.head = nn.Linear(self.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, saved = self.stem(x), []
        for step in self.steps:
            x = step(self, x, saved)
        return self.head(x.mean(POSITIONS[self.layout]))

    def _step(self, function: Callable[[Tensor], Tensor], layout: str | None = None) -> None:
        self.steps.append(lambda net, x, saved: function(x))
        self.layout = layout or self.layout

    def _layer(self, layer: nn.Module, width: int | None = None) -> None:
        self.layers.append(layer)
        self._call(len(self.layers) - 1)
        self.width = width or self.width

    def _call(self, index: int) -> None:
        self.steps.append(lambda net, x, saved: net.layers[index](x))

    def _draw_width(self) -> int:
        return self.random.choice((4, 6, 8, 12))

    def _conv(self) -> None:
        kind, width = nn.Conv2d if self.layout == "maps" else nn.Conv1d, self._draw_width()
        self._layer(kind(self.width, width, self.random.choice((1, 3)), padding="same"), width)

    def _depthwise(self) -> None:
        width = self.width * self.random.choice((1, 1, 2))
        self._layer(nn.Conv2d(self.width, width, 3, padding=1, groups=self.width), width)

    def _linear(self) -> None:
        width = self._draw_width()
        self._layer(nn.Linear(self.width, width), width)

    def _mlp(self) -> None:
        before, hidden = self.width, self._draw_width()
        self._layer(nn.Linear(before, hidden))
        self._activation()
        self._layer(nn.Linear(hidden, before))

    def _mix(self) -> None:
        self._layer(nn.Linear(64, 64))

    def _batch_norm(self) -> None:
        self._layer((nn.BatchNorm2d if self.layout == "maps" else nn.BatchNorm1d)(self.width))

    def _instance_norm(self) -> None:
        self._layer(nn.InstanceNorm2d(self.width, affine=True))

    def _group_norm(self) -> None:
        if self.width % 2 == 0:
            self._layer(nn.GroupNorm(2, self.width))

    def _layer_norm(self) -> None:
        self._layer(nn.LayerNorm(self.width))

    def _token_norm(self) -> None:
        self.layers.append(nn.BatchNorm1d(self.width))
        index = len(self.layers) - 1
        self.steps.append(lambda net, x, saved: net.layers[index](x.flatten(0, 1)).view(x.shape))

    def _attention(self) -> None:
        self._layer(Attention(self.width, self.random.choice((4, 8)), self.random.choice((True, False))))

    def _joint_attention(self) -> None:
        self._layer(JointAttention(self.width, self.random.choice((4, 8))))

    def _activation(self) -> None:
        self._step(self.random.choice((F.relu, F.gelu, F.silu, torch.sigmoid)))

    def _pool(self) -> None:
        self._step(lambda x: F.avg_pool2d(x, 3, 1, 1))

    def _again(self) -> None:
        square = [isinstance(x, nn.Linear) and x.in_features == x.out_features == self.width for x in self.layers]
        if any(square) and AXIS[self.layout] == -1:
            self._call(self.random.choice([index for index, fits in enumerate(square) if fits]))

    def _gate(self) -> None:
        axis = AXIS[self.layout]
        if self.width % 2 == 0:
            self._step(lambda x: torch.mul(*x.chunk(2, axis)))
            self.width //= 2

    def _rotate(self) -> None:
        axis = AXIS[self.layout]
        if self.width % 2 == 0:
            self._step(lambda x: torch.cat(x.chunk(2, axis)[::-1], axis))

    def _last(self) -> None:
        self._step(lambda x: x.permute(0, 2, 3, 1), "channels last")

    def _first(self) -> None:
        self._step(lambda x: x.permute(0, 3, 1, 2), "maps")

    def _merge(self) -> None:
        self._step(lambda x: x.flatten(1, 2), "tokens")

    def _join(self) -> None:
        self._step(lambda x: x.flatten(2), "sequence")

    def _split(self) -> None:
        self._step(lambda x: x.unflatten(2, (8, 8)), "maps")

    def _swap(self) -> None:
        self._step(lambda x: x.transpose(1, -1), "sequence" if self.layout == "tokens" else "tokens")

    def _save(self) -> None:
        self.saved.append((self.layout, self.width))
        self.steps.append(lambda net, x, saved: saved.append(x) or x)

    def _with_saved(self, function: Callable[[Tensor, Tensor], Tensor], any_width: bool = False) -> Any:
        numbers = range(len(self.saved))
        fitting = [
            k
            for k in numbers
            if self.saved[k] in ((self.layout, w) for w in (range(99) if any_width else [self.width]))
        ]
        if not fitting:
            return 0
        number = self.random.choice(fitting)
        self.steps.append(lambda net, x, saved: function(x, saved[number]))
        return self.saved[number][1]

    def _add(self) -> None:
        self._with_saved(torch.add)

    def _multiply(self) -> None:
        self._with_saved(lambda x, other: x * torch.sigmoid(other))

    def _concatenate(self) -> None:
        axis = AXIS[self.layout]
        self.width += self._with_saved(lambda x, other: torch.cat([x, other], axis), any_width=True)
