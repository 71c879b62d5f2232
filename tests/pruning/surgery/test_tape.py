"""The tape of a run gives at other sizes what the model does there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.operations.meta import to_meta
from prunekit.pruning.surgery.check_sizes import _Runs

TABLE = torch.zeros(1, device="meta")


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.function(self.norm(self.conv(x)))


def in_place(x):
    x[:, :1] = 0
    return x.mul_(2).relu_()


ON_THE_TAPE = {
    "pool": lambda x: F.max_pool2d(x, 2),
    "keywords": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "chunks of channels": lambda x: torch.cat(x.chunk(2, 1)[::-1], dim=1),
    "named tuple": lambda x: x.max(dim=1).values,
    "attributes": lambda x: x.to(x.dtype) if x.dim() == 4 and x.ndim == 4 and x.is_floating_point() else x,
    "in place": in_place,
}
READING = {
    "shape": lambda x: x[:, :, : x.shape[2] // 2],
    "size": lambda x: x if x.size(2) % 2 else x.flip(2),
    "len": lambda x: x * len(x[0, 0]),
    "same size": lambda x: x if x.is_same_size(x.flip(2)) else 0 * x,
    "elsewhere": lambda x: x + TABLE,
    "another shape": lambda x: x.relu().unsqueeze_(0),
    "rows": lambda x: torch.stack(list(x[0, 0])),
}


@pytest.mark.parametrize("name", [*ON_THE_TAPE, *READING])
def test_the_tape_says_all_where_no_size_is_read(name):
    function = {**ON_THE_TAPE, **READING}[name]
    batch = torch.zeros(1, 3, 32, 32, device="meta")
    runs, plain = (_Runs(to_meta(Function(function)).eval(), batch) for _ in range(2))
    runs.behaviors([(32, 32)])
    assert runs.is_complete is (name in ON_THE_TAPE)
    sizes = [(24, 24), (33, 20), (47, 47)]
    expected = {size: found for size in sizes for found in plain._called([size]).values()}
    assert runs.behaviors(sizes) == expected and expected


def test_what_is_split_into_another_number_of_parts_runs_again():
    rows = Function(lambda x: torch.cat(x.split(5, 2)))
    runs, plain = (_Runs(to_meta(rows).eval(), torch.zeros(1, 3, 20, 20, device="meta")) for _ in range(2))
    runs.behaviors([(20, 20)])
    assert runs.is_complete
    assert runs.behaviors([(40, 40), (60, 60)]) == plain._called([(40, 40), (60, 60)])
    assert not runs.is_complete


def test_sizes_that_fail_are_left_out():
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    runs = _Runs(to_meta(fixed), torch.zeros(1, 3, 16, 16, device="meta"))
    assert list(runs.behaviors([(16, 16)])) == [(16, 16)] and runs.is_complete
    assert runs.behaviors([(8, 8)]) == {} and list(runs.behaviors([(16, 16)])) == [(16, 16)]
