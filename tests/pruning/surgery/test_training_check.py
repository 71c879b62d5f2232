"""Code that only training runs is tried on the slim model."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import init_norms
from torch import nn

import prunekit
from prunekit.errors import PlanError
from prunekit.pruning.surgery.training_check import check_training


class TrainingOnly(nn.Module):
    """Does something with its channels in train mode, without a module."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        if self.training and self.kind == "buffer":
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        if self.training and self.kind == "linear":
            return self.out(x), F.linear(x.mean((2, 3)), self.weight)
        if self.training and self.kind == "backward":
            x.register_hook(lambda gradient: gradient * self.mean.view(1, 8, 1, 1))
        if self.training and self.kind == "features":
            return self.out(x), x
        if self.training and self.kind == "fails":
            raise ValueError("give targets in train mode")
        return self.out(x)


def slim(kind):
    torch.manual_seed(0)
    model = TrainingOnly("none")
    example = init_norms(model, size=12)
    model.kind = kind
    groups = prunekit.find_groups(model, example)
    group = next(group for group in groups if group.reason is None)
    plan = prunekit.Plan(groups={group.id: [0, 1, 2, 5]})
    return model, *prunekit.slim(model, plan, example, groups=groups)


@pytest.mark.parametrize("kind", ["buffer", "linear", "backward"])
def test_failure_in_train_mode_is_reported_with_the_line_of_code(kind):
    with pytest.raises(PlanError, match=r"fails in train mode: .*test_training_check\.py:\d+: .*\(ignored_layers\)"):
        slim(kind)


def test_outputs_of_other_shapes_in_train_mode_are_reported():
    with pytest.raises(
        PlanError, match=r"in train mode: outputs of shapes .*\(2, 4, 10, 10\).*, not .*\(2, 8, 10, 10\)"
    ):
        slim("features")


@pytest.mark.parametrize("kind", ["none", "fails"])
def test_models_that_train_alike_or_not_at_all_pass(kind):
    before = torch.get_rng_state()
    model, small, report = slim(kind)
    assert report.passed and small.conv.out_channels == 4
    assert not model.training and model.mean.eq(0).all() and all(p.grad is None for p in small.parameters())
    torch.set_rng_state(before)


class Seen(nn.Sequential):
    devices: ClassVar[list[str]] = []

    def forward(self, x):
        self.devices.append(x.device.type)
        return super().forward(x)


@pytest.mark.parametrize(("side", "device"), [(16, "cpu"), (320, "meta")])
def test_of_large_images_only_the_shapes_are_computed(side, device):
    dense, slim = (Seen(nn.Conv2d(3, width, 3), nn.Flatten(), nn.LazyLinear(2)) for width in (4, 3))
    for model in (dense, slim):
        model(torch.zeros(2, 3, side, side))
    Seen.devices.clear()
    check_training(dense, slim, [torch.zeros(2, 3, side, side)])
    assert Seen.devices[0] == device
    slim[2] = nn.Linear(7, 2)
    with pytest.raises(PlanError, match="fails in train mode"):
        check_training(dense, slim, [torch.zeros(2, 3, side, side)])


def test_sizes_that_the_dense_model_refuses_in_train_mode_do_not_decide():
    dense, slim = (nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 64, 2)) for width in (4, 3))
    slim[2] = nn.Linear(7, 2)
    with pytest.raises(PlanError, match="fails in train mode"):
        check_training(dense, slim, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 10, 10)])
