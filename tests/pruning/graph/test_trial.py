"""Numbers that code computes from a length, in every way to write them."""

import pytest
import torch
from torch import nn

from prunekit.pruning.graph.groups import find_groups


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(8, 16), nn.Linear(16, 3), scale

    def forward(self, x):
        return self.last(self.scale(self.first(x).relu()))


SCALES = {
    "number": lambda y: y / y.shape[1],
    "numel": lambda y: y / y.numel(),
    "new_tensor": lambda y: y / y.new_tensor([y.shape[1]]),
    "tensor": lambda y: y / torch.tensor(float(y.shape[1])),
    "tensor on device": lambda y: y / torch.tensor([y.shape[1]], device=y.device),
    "as_tensor": lambda y: y / torch.as_tensor(data=y.shape[1], dtype=y.dtype, device=y.device).sqrt(),
    "full": lambda y: y * torch.full((1,), float(y.shape[1]), device=y.device),
    "computed": lambda y: y * torch.ones(1, device=y.device).mul(y.shape[1]),
    "sum of a range": lambda y: y / torch.arange(1, y.shape[1] + 1, device=y.device).sum(),
}


@pytest.mark.parametrize("name", SCALES)
def test_number_that_is_a_length_forbids_pruning(name):
    (group,) = (g for g in find_groups(Scaled(SCALES[name]).eval(), torch.randn(4, 8)) if g.channels == 16)
    assert group.reason.startswith("the code relies on its number of channels")


@pytest.mark.parametrize("scale", [lambda y: y / y.new_tensor([3.0]), lambda y: y * torch.tensor([0.5, 2.0]).sum()])
def test_other_numbers_do_not(scale):
    (group,) = (g for g in find_groups(Scaled(scale).eval(), torch.randn(4, 8)) if g.channels == 16)
    assert group.reason is None
