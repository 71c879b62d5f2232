import pytest
import torch
from torch import nn

import prunekit
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
