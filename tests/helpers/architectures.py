"""Small networks of many kinds, beside those of ``zoo``: what they take, and whether they take another size.

``ARCHITECTURES`` maps names to cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.zoo import ZOO


@dataclass(frozen=True)
class Case:
    """A network, the shapes of its inputs, and other shapes that it takes; ``free``: so does its ONNX file."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    other: tuple[tuple[int, ...], ...] | None = None
    free: bool = True
    traceable: bool = True

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """The network with statistics in its norms, an example, and all inputs that it takes."""
        torch.manual_seed(0)
        model = self.build().train()
        example = tuple(torch.randn(shape) for shape in self.shapes)
        with torch.no_grad():
            for _ in range(3):
                model(*(torch.randn(4, *shape[1:]) for shape in self.shapes))
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.1)
        taken = [example, tuple(value[:1] for value in example)]
        if self.other:
            taken.append(tuple(torch.randn(shape) for shape in self.other))
        return model.eval(), example, taken


def conv_bn(inp: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def classifier(*head: nn.Module) -> nn.Sequential:
    return nn.Sequential(*conv_bn(3, 9), *head)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(400, 20), nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 400))))


class Mixer(nn.Module):
    """Tolstikhin et al., 2021: linear layers over tokens and over channels."""

    def __init__(self, width: int = 12, tokens: int = 16):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, width, 8, 8), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, 9), nn.GELU(), nn.Linear(9, tokens))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x.mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attention = conv_bn(3, 8, 4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class ResizeIfNeeded(nn.Module):
    """It interpolates only where two sizes differ, which torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.out = conv_bn(3, 9), conv_bn(9, 11, 2), nn.Conv2d(20, 1, 1)

    def forward(self, x):
        fine = self.stem(x)
        coarse = F.interpolate(self.down(fine), scale_factor=2.0, mode="bilinear")
        if coarse.shape[2:] != fine.shape[2:]:
            coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
        return self.out(torch.cat([fine, coarse], 1))


class TwoHeads(nn.Module):
    """A map and a side output, as ``form`` returns them."""

    def __init__(self, form: Callable):
        super().__init__()
        self.stem, self.main, self.side, self.form = conv_bn(3, 9), nn.Conv2d(9, 2, 1), nn.Conv2d(9, 1, 1), form

    def forward(self, x):
        features = self.stem(x)
        main = F.interpolate(self.main(features), x.shape[-2:], mode="bilinear")
        return self.form(main, self.side(features))


class TwoInputs(nn.Module):
    """A photograph and a depth map."""

    def __init__(self):
        super().__init__()
        self.colour, self.depth, self.out = conv_bn(3, 9), conv_bn(1, 7), nn.Conv2d(16, 1, 1)

    def forward(self, photo, depth):
        return self.out(torch.cat([self.colour(photo), self.depth(depth)], 1))


class Call(nn.Module):
    """What a function makes of an input and a convolution."""

    def __init__(self, function: Callable):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 9, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv, x)


class AnyInputs(Call):
    def forward(self, *inputs):
        return self.function(self.conv, *inputs)


def in_place(conv, x):
    x -= 0.5
    return conv(x)


class Keywords(nn.Module):
    """Inputs are passed by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9)

    def forward(self, x):
        return F.max_pool2d(input=F.relu(input=self.norm(input=self.conv(input=x))), kernel_size=2)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class SelfSums(nn.Module):
    """Each value is added to what is computed from it, without a convolution in between."""

    def __init__(self, times: int = 40):
        super().__init__()
        self.stem, self.out, self.times = conv_bn(3, 9), nn.Conv2d(9, 1, 1), times

    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.times):
            x = (x + F.relu(x)) * 0.5
        for _ in range(self.times):
            x = x + F.avg_pool2d(x, 1)
        return self.out(torch.tanh(x))


def features(norm: type, conv: type, pool: type, last: type, channels: int) -> nn.Sequential:
    layers = [conv(channels, 9, 3, padding=1), norm(9), nn.ReLU(), pool(2), conv(9, 13, 3, padding=1), norm(13)]
    return nn.Sequential(*layers, nn.ReLU(), last(1), nn.Flatten(), nn.Linear(13, 5))


_IMAGE = ((2, 3, 32, 32),)
_OTHER = ((1, 3, 45, 38),)
_ONE_SIZE = {"vgg"}  # adaptive pooling to 4×4

ARCHITECTURES = {
    "linear_head": Case(
        lambda: classifier(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4)),
        _IMAGE,
        _OTHER,
    ),
    "one_size": Case(lambda: classifier(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9 * 16 * 16, 10)), _IMAGE, free=False),
    "lenet": Case(LeNet, _IMAGE, free=False),
    "adaptive_3": Case(
        lambda: classifier(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(81, 5)), _IMAGE, _OTHER, free=False
    ),
    "adaptive_5": Case(
        lambda: classifier(nn.AdaptiveAvgPool2d((5, 5)), nn.Flatten(), nn.Linear(225, 5)), _IMAGE, _OTHER, free=False
    ),
    "adaptive_max": Case(
        lambda: classifier(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)), _IMAGE, _OTHER, free=False
    ),
    "alexnet": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 9, 5, 2, 2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Conv2d(9, 13, 3, padding=1)),
            *(nn.ReLU(True), nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten(), nn.Dropout(), nn.Linear(13 * 36, 20)),
            *(nn.ReLU(True), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(True), nn.Linear(20, 10)),
        ),
        ((2, 3, 64, 64),),
        ((1, 3, 80, 72),),
        free=False,
    ),
    "mixer": Case(Mixer, _IMAGE, free=False),
    "attention": Case(Attention, _IMAGE, _OTHER),
    "resize_if_needed": Case(ResizeIfNeeded, _IMAGE, _OTHER, free=False, traceable=False),
    "tuple": Case(lambda: TwoHeads(lambda a, b: (a, b)), _IMAGE, _OTHER),
    "list": Case(lambda: TwoHeads(lambda a, b: [a, [b]]), _IMAGE, _OTHER),
    "dict": Case(lambda: TwoHeads(lambda a, b: {"out": a, "aux": b}), _IMAGE, _OTHER),
    "two_inputs": Case(TwoInputs, ((2, 3, 32, 32), (2, 1, 32, 32)), ((1, 3, 45, 38), (1, 1, 45, 38))),
    "in_place": Case(lambda: Call(in_place), _IMAGE, _OTHER),
    "split": Case(lambda: Call(lambda conv, x: conv(x).split(3, 1)), _IMAGE, _OTHER),
    "any_inputs": Case(lambda: AnyInputs(lambda conv, x: conv(x)), _IMAGE, _OTHER, traceable=False),
    "keywords": Case(Keywords, _IMAGE, _OTHER),
    "self_sums": Case(SelfSums, _IMAGE, _OTHER),
    "mlp_of_images": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 4)),
        ((2, 3, 8, 8),),
        free=False,
    ),
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 12), nn.Sigmoid(), nn.Linear(12, 4)),
        ((2, 10),),
    ),
    "mlp_with_norms": Case(
        lambda: nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.PReLU(), nn.Linear(20, 4)), ((2, 10),)
    ),
    "audio": Case(
        lambda: features(nn.BatchNorm1d, nn.Conv1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d, 1),
        ((2, 1, 160),),
        ((1, 1, 99),),
    ),
    "video": Case(
        lambda: features(nn.BatchNorm3d, nn.Conv3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, 3),
        ((2, 3, 8, 16, 16),),
        ((1, 3, 6, 20, 18),),
    ),
    "deep": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), *(Block(4) for _ in range(400)), nn.AdaptiveAvgPool2d(1)),
        ((2, 3, 8, 8),),
        ((1, 3, 12, 9),),
    ),
    **{name: Case(build, _IMAGE, _OTHER, free=name not in _ONE_SIZE) for name, build in ZOO.items()},
}
