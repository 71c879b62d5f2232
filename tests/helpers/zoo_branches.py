"""Small networks whose channels are joined, split, shuffled or shared: (N, 3, 32, 32) → logits (N, 10), or a map
(N, 1, 32, 32) of the U-Nets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, -1, height, width)


class ShuffleV1Unit(nn.Module):
    """Zhang et al., 2018: grouped 1×1 convolutions with a shuffle between them; a residual or a pooled shortcut."""

    def __init__(self, inp: int, out: int, stride: int, groups: int):
        super().__init__()
        self.stride, self.groups = stride, groups
        middle = out // 2
        out = out - inp if stride == 2 else out
        self.conv1 = nn.Conv2d(inp, middle, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = channel_shuffle(out, self.groups)
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(out + x)


class ShuffleV2Unit(nn.Module):
    """Ma et al., 2018: half of the channels bypasses the unit; then a shuffle."""

    def __init__(self, inp: int, out: int, stride: int):
        super().__init__()
        self.stride, half = stride, out // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
                nn.BatchNorm2d(inp),
                nn.Conv2d(inp, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inp if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    """ShuffleNetV1 (``groups`` of its 1×1 convolutions) or V2 (``groups`` 0)."""

    def __init__(self, groups: int = 0, width: int = 16, classes: int = 10):
        super().__init__()
        unit = (lambda *a: ShuffleV1Unit(*a, groups)) if groups else ShuffleV2Unit
        stem = width // 2
        self.conv1 = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(unit(stem, width, 2), unit(width, width, 1), unit(width, width, 1))
        self.conv5 = nn.Sequential(nn.Conv2d(width, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU(inplace=True))
        self.fc = nn.Linear(20, classes)

    def forward(self, x):
        x = self.conv5(self.stage2(self.conv1(x)))
        x = x.mean([2, 3])
        return self.fc(x)


class DenseLayer(nn.Module):
    def __init__(self, inp: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inp), nn.Conv2d(inp, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inp: int, growth: int):
        super().__init__()
        for index in range(layers):
            self[f"denselayer{index + 1}"] = DenseLayer(inp + index * growth, growth)

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Huang et al., 2017: each layer reads all previous ones; a transition halves channels and size."""

    def __init__(self, blocks=(3, 3), growth=4, stem=8, classes=10):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, stem, 3, 1, 1, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(stem))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        width = stem
        for index, layers in enumerate(blocks):
            self.features.add_module(f"denseblock{index + 1}", DenseBlock(layers, width, growth))
            width += layers * growth
            if index + 1 < len(blocks):
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(width))
                transition.add_module("relu", nn.ReLU(inplace=True))
                transition.add_module("conv", nn.Conv2d(width, width // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                self.features.add_module(f"transition{index + 1}", transition)
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class DoubleConv(nn.Module):
    def __init__(self, inp: int, out: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inp, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Up(nn.Module):
    def __init__(self, inp: int, skip: int, out: int, bilinear: bool):
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(inp + skip, out)
        else:
            self.up = nn.ConvTranspose2d(inp, inp // 2, 2, stride=2)
            self.conv = DoubleConv(inp // 2 + skip, out)

    def forward(self, x1, x2):
        x1 = self.up(x1)
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """Ronneberger et al., 2015: skip connections from encoder to decoder; odd sizes are padded."""

    def __init__(self, bilinear: bool, width: int = 6):
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * width, 2 * width))
        self.up1 = Up(2 * width, 2 * width, width, bilinear)
        self.up2 = Up(width, width, width, bilinear)
        self.outc = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        return self.outc(self.up2(x, x1))


class BasicConv(nn.Module):
    def __init__(self, inp: int, out: int, **options):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inp, out, bias=False, **options), nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    def __init__(self, inp: int, width: int):
        super().__init__()
        self.branch1 = BasicConv(inp, width, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv(inp, width, kernel_size=1), BasicConv(width, 2 * width, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv(inp, width, kernel_size=1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1)


class GoogLeNet(nn.Module):
    """Szegedy et al., 2015: parallel branches, and an auxiliary head in train mode."""

    def __init__(self, width: int = 4, classes: int = 10):
        super().__init__()
        self.conv1 = BasicConv(3, 8, kernel_size=3, stride=2, padding=1)
        self.inception1, self.inception2 = Inception(8, width), Inception(4 * width, width)
        self.aux_conv, self.aux_fc = BasicConv(4 * width, 6, kernel_size=1), nn.Linear(6, classes)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x):
        x = self.inception1(self.conv1(x))
        aux = None
        if self.training:
            aux = self.aux_fc(F.adaptive_avg_pool2d(self.aux_conv(x), 1).flatten(1))
        x = self.inception2(x)
        x = self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return (x, aux) if self.training else x


class SharedHead(nn.Module):
    """Lin et al., 2017 (feature pyramid): one head with norms on two scales."""

    def __init__(self, width: int = 8, classes: int = 10):
        super().__init__()
        self.c2 = BasicConv(3, 6, kernel_size=3, stride=2, padding=1)
        self.c3 = BasicConv(6, 10, kernel_size=3, stride=2, padding=1)
        self.lateral2, self.lateral3 = nn.Conv2d(6, width, 1), nn.Conv2d(10, width, 1)
        self.head = nn.Sequential(BasicConv(width, width, kernel_size=3, padding=1), nn.Conv2d(width, classes, 1))

    def forward(self, x):
        c2 = self.c2(x)
        c3 = self.c3(c2)
        p3 = self.lateral3(c3)
        p2 = self.lateral2(c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        return self.head(p2).mean((2, 3)) + self.head(p3).mean((2, 3))


class WeightTied(nn.Module):
    """A residual block whose convolutions are called several times, with different norms."""

    def __init__(self, width: int = 8, times: int = 3, classes: int = 10):
        super().__init__()
        self.stem = BasicConv(3, width, kernel_size=3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms1 = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(times))
        self.norms2 = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(times))
        self.last = BasicConv(width, 12, kernel_size=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.stem(x)
        for norm1, norm2 in zip(self.norms1, self.norms2, strict=True):
            x = F.relu(x + norm2(self.conv2(F.relu(norm1(self.conv1(x))))))
        return self.fc(self.last(x).mean((-2, -1)))


BRANCHES = {
    "shufflenet_v1": lambda: ShuffleNet(groups=2),
    "shufflenet_v2": ShuffleNet,
    "densenet": DenseNet,
    "unet_bilinear": lambda: UNet(bilinear=True),
    "unet_transposed": lambda: UNet(bilinear=False),
    "googlenet_aux": GoogLeNet,
    "shared_head": SharedHead,
    "weight_tied": WeightTied,
}
