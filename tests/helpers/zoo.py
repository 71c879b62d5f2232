"""Small versions of common image classifiers, in their usual coding style: (N, 3, 32, 32) → logits (N, 10).

``ZOO`` maps names to functions that build them, including those of ``zoo_branches``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from helpers.zoo_branches import BRANCHES


def conv_bn(inp: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU):
    layers = [nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class VGG(nn.Module):
    """Simonyan and Zisserman, 2014, with norms; convolutions have biases, the classifier reads every position."""

    def __init__(self, plan: tuple = (8, "M", 12, "M", 16, 16, "M"), classes: int = 10):
        super().__init__()
        layers, width = [], 3
        for out in plan:
            if out == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                width = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4))
        self.classifier = nn.Sequential(
            nn.Linear(width * 16, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(True), nn.Dropout()
        )
        self.fc = nn.Linear(24, classes)

    def forward(self, x):
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.fc(self.classifier(x))


class BasicBlock(nn.Module):
    """He et al., 2015: two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inp: int, width: int, stride: int, se: bool = False, **_):
        super().__init__()
        self.conv1 = nn.Conv2d(inp, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcite(width) if se else None
        same = stride == 1 and inp == width
        self.downsample = None if same else conv_bn(inp, width, 1, stride, act=None)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.se is not None:
            out = self.se(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """He et al., 2015: 1×1, 3×3, 1×1; in groups, Xie et al., 2017 (ResNeXt)."""

    expansion = 4

    def __init__(self, inp: int, width: int, stride: int, groups: int = 1, **_):
        super().__init__()
        out = width * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inp, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_bn(inp, out, 1, stride, act=None) if stride != 1 or inp != out else None

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class OptionA(nn.Module):
    """He et al., 2015, as for CIFAR: the shortcut subsamples and pads with zero channels."""

    expansion = 1

    def __init__(self, inp: int, width: int, stride: int, **_):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.more = width - inp

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(out + x)


class PreActivation(nn.Module):
    """He et al., 2016: norm and activation precede the convolutions."""

    expansion = 1

    def __init__(self, inp: int, width: int, stride: int, **_):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inp), nn.Conv2d(inp, width, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if stride != 1 or inp != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, width, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class RepVGG(nn.Module):
    """Ding et al., 2021: 3×3, 1×1 and a norm alone, summed."""

    expansion = 1

    def __init__(self, inp: int, width: int, stride: int, **_):
        super().__init__()
        self.rbr_dense = conv_bn(inp, width, 3, stride, act=None)
        self.rbr_1x1 = conv_bn(inp, width, 1, stride, act=None)
        self.rbr_identity = nn.BatchNorm2d(inp) if stride == 1 and inp == width else None
        self.nonlinearity = nn.ReLU()

    def forward(self, x):
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, pooling and a linear layer.

    Args:
        imagenet: a stem of 7×7 stride 2 and max-pooling instead of 3×3.
        last_norm: a norm and ReLU after the last block instead of in the stem (pre-activation).
    """

    def __init__(self, block, widths=(6, 8), blocks=2, imagenet=False, last_norm=False, classes=10, **options):
        super().__init__()
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(3, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.Identity() if last_norm else nn.BatchNorm2d(widths[0])
        self.relu = nn.Identity() if last_norm else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        inp, stages = widths[0], []
        for stage, width in enumerate(widths):
            layers = []
            for index in range(blocks):
                layers.append(block(inp, width, 2 if stage and not index else 1, **options))
                inp = width * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layers = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(inp) if last_norm else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inp, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layers(x)
        if self.norm is not None:
            x = F.relu(self.norm(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class SqueezeExcite(nn.Module):
    """Hu et al., 2018, with 1×1 convolutions."""

    def __init__(self, width: int, squeeze: int = 4, act=F.relu, gate=torch.sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(width, squeeze, 1), nn.Conv2d(squeeze, width, 1)
        self.act, self.gate = act, gate

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(self.avgpool(x)))))


class LinearSqueezeExcite(nn.Module):
    """Hu et al., 2018, with linear layers, as in many MobileNetV3s."""

    def __init__(self, width: int, squeeze: int = 4, broadcast: str = "view"):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, squeeze), nn.ReLU(inplace=True), nn.Linear(squeeze, width), nn.Hardsigmoid()
        )
        self.broadcast = broadcast

    def forward(self, x):
        if self.broadcast == "view":
            b, c, _, _ = x.size()
            y = self.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
            return x * y.expand_as(x)
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class InvertedResidual(nn.Module):
    """Sandler et al., 2018: expansion, depthwise, projection without activation; residual where shapes agree.

    Args:
        se: builds the module after the depthwise convolution for a width (MobileNetV3, EfficientNet), or None.
        drop: probability that a block is dropped in train mode (Huang et al., 2016).
    """

    def __init__(self, inp, out, stride, expand, act=nn.ReLU6, kernel=3, se=None, drop=0.0):
        super().__init__()
        hidden = round(inp * expand)
        self.use_res_connect = stride == 1 and inp == out
        layers = [conv_bn(inp, hidden, 1, act=act)] if expand != 1 else []
        layers.append(conv_bn(hidden, hidden, kernel, stride, hidden, act=act))
        if se is not None:
            layers.append(se(hidden))
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)
        self.drop = drop

    def forward(self, x):
        if not self.use_res_connect:
            return self.conv(x)
        y = self.conv(x)
        if self.training and self.drop:
            keep = 1 - self.drop
            y = y / keep * torch.empty(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(keep)
        return x + y


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al., 2018), V3 (Howard et al., 2019) and EfficientNet (Tan and Le, 2019) by their
    blocks: (inputs, outputs, stride, expansion, kernel, squeeze-excite).

    Args:
        hidden: width of a linear layer with activation before the classifier (V3); 0: none.
    """

    def __init__(self, blocks, act=nn.ReLU6, last=16, hidden=0, drop=0.0, classes=10):
        super().__init__()
        first, final = blocks[0][0], blocks[-1][1]
        layers = [conv_bn(3, first, 3, 2, act=act)]
        layers += [InvertedResidual(i, o, s, e, act, k, se, drop) for i, o, s, e, k, se in blocks]
        layers.append(conv_bn(final, last, 1, act=act))
        self.features = nn.Sequential(*layers)
        more = [nn.Linear(last, hidden), act()] if hidden else []
        self.classifier = nn.Sequential(*more, nn.Dropout(0.2), nn.Linear(hidden or last, classes))

    def forward(self, x):
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = x.view(x.shape[0], -1)
        return self.classifier(x)


def mobilenet_v2() -> nn.Module:
    return MobileNet([(6, 4, 1, 1, 3, None), (4, 6, 2, 3, 3, None), (6, 6, 1, 3, 3, None), (6, 8, 1, 3, 3, None)])


def mobilenet_v3() -> nn.Module:
    sliced = lambda width: LinearSqueezeExcite(width, broadcast="slice")  # noqa: E731
    blocks = [(6, 6, 1, 1, 3, LinearSqueezeExcite), (6, 8, 2, 2.5, 5, sliced), (8, 8, 1, 2, 5, LinearSqueezeExcite)]
    return MobileNet(blocks, nn.Hardswish, hidden=12)


def efficientnet() -> nn.Module:
    se = lambda width: SqueezeExcite(width, act=F.silu)  # noqa: E731
    return MobileNet([(6, 4, 1, 1, 3, se), (4, 6, 2, 3, 5, se), (6, 6, 1, 3, 3, se)], nn.SiLU, drop=0.2)


class StyleTransfer(nn.Module):
    """Johnson et al., ECCV 2016: instance norms, a residual block, grouped and transposed convolutions."""

    def __init__(self, width: int = 8, classes: int = 10):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.InstanceNorm2d(width, affine=True), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, groups=4), nn.InstanceNorm2d(2 * width, affine=True), nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.ConvTranspose2d(width, 12, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(12, affine=True), nn.ReLU()
        )
        self.out = nn.Conv2d(12, classes, 1)

    def forward(self, x):
        x = self.down(x)
        return self.out(self.up(x + self.block(x))).amax((2, 3))


ZOO = {
    "vgg": VGG,
    "resnet_basic": lambda: ResNet(BasicBlock),
    "resnet_bottleneck": lambda: ResNet(Bottleneck, (4, 6), imagenet=True),
    "resnet_option_a": lambda: ResNet(OptionA),
    "resnet_preactivation": lambda: ResNet(PreActivation, last_norm=True),
    "resnet_se": lambda: ResNet(BasicBlock, se=True),
    "resnext": lambda: ResNet(Bottleneck, (8, 12), groups=4),
    "repvgg": lambda: ResNet(RepVGG),
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
    "efficientnet": efficientnet,
    "style_transfer": StyleTransfer,
    **BRANCHES,
}
