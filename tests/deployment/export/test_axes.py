import pytest
import torch
from torch import nn

from prunekit.deployment.export.axes import export_with_free_axes, free_axes, other_sizes
from prunekit.errors import ExportError


@pytest.mark.parametrize(
    ("value", "axes"),
    [
        (torch.zeros(2, 3), {0: "N"}),
        (torch.zeros(2, 3, 9), {0: "N", 2: "L"}),
        (torch.zeros(2, 3, 9, 9), {0: "N", 2: "H", 3: "W"}),
        (torch.zeros(2, 9, 9, 3, dtype=torch.uint8), {0: "N", 1: "H", 2: "W"}),
        (torch.zeros(2, 3, 9, 9, 9), {0: "N", 2: "D", 3: "H", 4: "W"}),
    ],
)
def test_free_axes(value, axes):
    assert free_axes(value) == axes and free_axes(value, "batch") == {0: "N"} and free_axes(value, "none") == {}


def test_other_sizes_change_sides_only():
    sizes = [tuple(value.shape) for (value,) in other_sizes([torch.zeros(2, 3, 32, 32)])]
    assert sizes == [(2, 3, 29, 27), (2, 3, 45, 38), (2, 3, 64, 64)]
    assert other_sizes([torch.zeros(2, 3, 1, 1)])[0][0].shape == (2, 3, 1, 1)


class OneBatch(nn.Module):
    def forward(self, x):
        return x.view(2, 768)


@pytest.mark.parametrize(
    ("model", "attempts"),
    [
        (nn.Conv2d(3, 1, 1), ["all", "batch", "none"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 1)), ["batch", "none"]),
        (OneBatch(), ["none"]),
    ],
)
def test_axes_are_fixed_one_after_the_other(model, attempts):
    tried = []

    def export(free):
        tried.append(free)
        return free

    def check(file, inputs):
        raise ExportError("differs")

    assert export_with_free_axes(export, check, model, torch.zeros(2, 3, 16, 16)) == "none"
    assert tried == attempts


def test_error_of_the_last_attempt_is_raised():
    def export(free):
        raise ExportError(f"cannot leave {free} free")

    with pytest.raises(ExportError, match="cannot leave none free"):
        export_with_free_axes(export, lambda *_: None, nn.Conv2d(3, 1, 1), torch.zeros(2, 3, 16, 16))
