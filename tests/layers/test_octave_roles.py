"""Each operation that branches do for themselves, and each that ends them."""

import pytest
import torch
import torch.nn.functional as F
from helpers.octave_networks import EXAMPLE, Net, images, settled
from torch import nn

from prunekit.layers.octave_ops import merge
from prunekit.layers.octavize import octavize

REWRITTEN = {
    **{f.__name__: lambda net, x, f=f: f(x) for f in (F.relu, F.elu, F.silu, F.gelu, F.hardtanh, F.softplus)},
    "leaky_relu": lambda net, x: F.leaky_relu(x, 0.3, inplace=True),
    "sigmoid": lambda net, x: torch.sigmoid(x) + x.tanh(),
    "clamp": lambda net, x: x.clamp(-1, 1).contiguous(),
    "numbers": lambda net, x: (2 * x - 1) / 3 + x * 0.5 + (1 + x).mul(2),
    "sums": lambda net, x: torch.add(x, F.relu(x)) + x.add(F.relu(-1 * x)),
    "max_pool2d": lambda net, x: F.max_pool2d(F.max_pool2d(x, 2), 3, 2, padding=1),
    "max_pool": lambda net, x: torch.max_pool2d(x, (2, 2), ceil_mode=True),
    "avg_pool2d": lambda net, x: F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 2),
    "norm": lambda net, x: net.norm(x),
    "prelu": lambda net, x: net.prelu(x),
    "depthwise": lambda net, x: net.depthwise(x),
}  # fmt: skip
MODULES = (
    nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Softplus(), nn.Sigmoid(), nn.Tanh(), nn.Identity(), nn.Dropout(0.5),
    nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True),
)  # fmt: skip


def call_module(net, x):
    return net.module(x)


@pytest.mark.parametrize(
    "middle, module",
    [*((f, None) for f in REWRITTEN.values()), *((call_module, m) for m in MODULES)],
    ids=[*REWRITTEN, *(type(m).__name__ for m in MODULES)],
)
def test_per_branch_operations_keep_the_branches(middle, module):
    parts = {"norm": nn.BatchNorm2d(6), "prelu": nn.PReLU(6)}
    parts["depthwise"] = nn.Conv2d(6, 6, 3, 2, padding=2, dilation=2, groups=6)
    model = settled(lambda: Net(middle, module=module, **parts))
    same, made = octavize(model, EXAMPLE, [1, 0]), octavize(model, EXAMPLE)
    x = images((13, 18))
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
        assert made(x).isfinite().all()
    # The branches are put together at the mean and nowhere else.
    ends = {key for key, why in made.octave_left.items() if "never called" not in why}
    assert ends == {"stem.0", "mean"} and not any(step.target is merge for step in made._steps)


def attention(net, x):
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def conv(**options):
    return nn.Conv2d(6, 6, bias=False, **{"kernel_size": 3, "padding": 1, **options})


END = {
    "cat": ("cat", "one tensor", lambda net, x: net.module(torch.cat([x, -1 * x], 1)), nn.Conv2d(12, 6, 1, bias=False)),
    "product": ("mul", "one tensor", attention, None),
    "own parameter": ("mul", "one tensor", lambda net, x: x * net.weight, None),
    "interpolate": ("interpolate", "one tensor", lambda net, x: F.interpolate(x, scale_factor=2), None),
    "inconsistent pool": (
        "max_pool2d",
        "sizes consistent",
        lambda net, x: F.max_pool2d(x, 2, stride=1),
        None,
    ),
    "pool that rounds up": (
        "max_pool2d",
        "sizes consistent",
        lambda net, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        None,
    ),
    "pool of another kind": ("module", "one tensor", call_module, nn.AdaptiveMaxPool2d(4)),
    "difference": ("sub", "one tensor", lambda net, x: x - F.relu(x), None),
    "sum of different shapes": ("add", "different shapes", lambda net, x: x + x[:, :1], None),
    "norm of another kind": ("module", "one tensor", call_module, nn.GroupNorm(2, 6)),
    "softmax": ("softmax", "one tensor", lambda net, x: F.softmax(x, 1), None),
    "groups": ("module", "3 groups", call_module, conv(groups=3)),
    "dilation": ("module", "dilation", call_module, conv(dilation=2, padding=2)),
    "no padding": ("module", "padding is (0, 0)", call_module, conv(padding=0)),
    "even kernel": ("module", "kernel is (2, 2)", call_module, conv(kernel_size=2)),
    "oblong kernel": ("module", "kernel is (1, 3)", call_module, conv(kernel_size=(1, 3), padding=(0, 1))),
    "oblong stride": ("module", "stride (2, 1)", call_module, conv(stride=(2, 1))),
    "wide padding": ("module", "padding is (1, 1)", call_module, conv(kernel_size=1)),
    "reflection": ("module", "'reflect'", call_module, conv(padding_mode="reflect")),
    "bias": ("module", "bias and no following norm", call_module, nn.Conv2d(6, 6, 1)),
    "twice": ("module", "more than once", lambda net, x: net.module(net.module(x)), conv()),
    "parametrized": ("module", "parametrization", call_module, nn.utils.parametrizations.weight_norm(conv())),
    "transposed": ("module", "one tensor", call_module, nn.ConvTranspose2d(6, 6, 2, 2)),
}


@pytest.mark.parametrize("name", END)
def test_operations_that_merge_branches_are_listed(name):
    label, why, middle, module = END[name]
    parts = {"weight": nn.Parameter(torch.ones(6, 1, 1))}
    model = settled(lambda: Net(middle, module=module, **parts), size=21)
    made, same = octavize(model, EXAMPLE), octavize(model, EXAMPLE, [1, 0])
    found = made.octave_left.get(label) or next(v for k, v in made.octave_left.items() if k.startswith(f"{label}_"))
    assert why in found
    assert {"one.0", "two.0"} <= set(made.octave_layers)
    x = images((15, 18))
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
        assert made(x).isfinite().all()
