"""The networks of the zoo run at several sizes and have the properties of their architectures."""

import pytest
import torch
from helpers.networks import init_norms
from helpers.zoo import ZOO
from torch import nn


@pytest.mark.parametrize("name", ZOO)
def test_network_runs_in_both_modes_and_its_output_varies(name):
    torch.manual_seed(0)
    model = ZOO[name]()
    example = init_norms(model)
    with torch.no_grad():
        out = model(example)
        other = model(torch.randn(2, 3, 48, 40))
    assert out.shape == ((4, 1, 32, 32) if name.startswith("unet") else (4, 10)) and len(other) == 2
    assert out.isfinite().all() and out.std(0).min() > 1e-4
    assert sum(p.numel() for p in model.parameters()) < 60_000


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_takes_part_in_training(name):
    idle = set()
    for seed in range(2):  # a squeeze of width four may be dead at initialization
        torch.manual_seed(seed)
        model = ZOO[name]().train()
        for module in model.modules():
            if getattr(module, "drop", 0):
                module.drop = 0.0  # a dropped block has no gradient
        out = model(torch.randn(4, 3, 32, 32))
        sum((y * torch.randn_like(y)).sum() for y in (out if isinstance(out, tuple) else (out,))).backward()
        now = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        idle = now & idle if seed else now
    assert not idle


def modules(name, kind):
    return [m for m in ZOO[name]().modules() if isinstance(m, kind)]


def test_convolution_groups_match_the_papers():
    grouped = {n: {m.groups for m in modules(n, nn.Conv2d)} for n in ZOO}
    assert grouped["resnext"] == {1, 4}
    assert {1, 2} < grouped["shufflenet_v1"]
    depthwise = {n for n in ZOO for m in modules(n, nn.Conv2d) if 1 < m.groups == m.in_channels == m.out_channels}
    assert depthwise == {"mobilenet_v2", "mobilenet_v3", "efficientnet", "shufflenet_v1", "shufflenet_v2"}
    assert [m.stride for m in modules("unet_transposed", nn.ConvTranspose2d)] == [(2, 2)] * 2
    assert modules("mobilenet_v2", nn.ReLU6) and modules("mobilenet_v3", nn.Hardswish)
