import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunekit
from prunekit.pruning.surgery import precision
from prunekit.pruning.surgery.precision import in_float64

ONES = torch.ones(3)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: ONES.float(),
        lambda: ONES.half(),
        lambda: ONES.to(torch.float32),
        lambda: ONES.to(dtype=torch.bfloat16),
        lambda: ONES.softmax(-1, dtype=torch.float32),
        lambda: torch.zeros(3),
        lambda: torch.arange(0.0, 3),
        lambda: torch.zeros(3, dtype=torch.float32),
    ],
)
def test_lower_precisions_become_float64(compute):
    with in_float64():
        assert compute().dtype == torch.float64
    assert compute().dtype != torch.float64


def test_other_types_stay():
    with in_float64():
        assert ONES.to(torch.int64).dtype == ONES.long().dtype == torch.int64
        assert torch.arange(3).dtype == torch.int64 and ONES.bool().dtype == torch.bool


class Rounds(nn.Module):
    """Computes its attention in float32, whatever its input is."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.last = nn.Linear(8, 64), nn.Linear(8, 64), nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x):
        scores = self.q(x).float() @ self.k(x).float().transpose(1, 2) + torch.zeros(1)
        return 10 * self.last((9 * scores).softmax(-1, dtype=torch.float32).to(x.dtype) @ self.v(x))


def test_rounding_of_the_model_does_not_hide_differences():
    torch.manual_seed(0)
    pruner = prunekit.Pruner(Rounds().eval(), torch.randn(4, 5, 8), importance="magnitude", pruning_ratio=0.3)
    _, report = pruner.step()
    assert report.equivalence.max_abs_diff < 1e-10


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(pairs, pairs, st.tuples(*[st.integers(0, 2)] * 2), pairs, st.sampled_from([1, 2, 4]), st.booleans())
def test_convolutions_are_those_of_pytorch(kernel, stride, padding, dilation, groups, bias):
    generator = torch.Generator().manual_seed(0)
    for channels in {4, 2 * groups}:  # with as many groups as channels, and else
        x, weight, shift = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((2, 4, 8, 7), (channels, 4 // groups, *kernel), (channels,))
        )
        options = (weight, shift if bias else None, stride, padding, dilation, groups)
        result = precision.conv2d(x, *options)
        torch.testing.assert_close(result, F.conv2d(x, *options), rtol=1e-12, atol=1e-12)
        assert result.is_contiguous()


@pytest.mark.parametrize(("side", "is_product"), [(4, True), (64, False)])
def test_only_small_maps_are_multiplied(monkeypatch, side, is_product):
    called = []
    monkeypatch.setattr(precision.F, "pad", lambda x, sides, pad=F.pad: called.append(1) or pad(x, sides))
    with in_float64():
        nn.Conv2d(3, 4, 3, padding=1)(torch.randn(2, 3, side, side))
    assert bool(called) is is_product
