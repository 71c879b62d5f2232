import numpy as np
import pytest
import torch
from torch import nn

from prunekit.deployment.export.validate import max_abs_difference
from prunekit.errors import ExportError

IMAGES = [torch.ones(1, 3, 4, 4), torch.full((2, 3, 5, 5), 2.0)]


def test_largest_difference_is_returned():
    assert max_abs_difference("file", lambda image: image * np.float32(1 + 2**-14), nn.Identity(), IMAGES) == 2**-13


class Levels(nn.Module):
    def forward(self, x):
        return x.to(torch.uint8)


@pytest.mark.parametrize(
    ("compute", "model", "message"),
    [
        (
            lambda image: image + np.float32(3e-4),
            nn.Identity(),
            r"by 0\.0003 on an input of 1×3×4×4$",
        ),
        (lambda image: image * np.float32(np.nan), nn.Identity(), "file differs from the model by nan"),
        (lambda image: image[:, :1], nn.Identity(), r"file returns float32 \(1, 1, 4, 4\)"),
        (lambda image: image.astype(np.float64), nn.Identity(), "file returns float64"),
        (lambda image: image.astype(np.uint8) + 2, Levels(), r"by 2 levels"),
        (lambda image: 1 / 0, nn.Identity(), "file cannot be run on an input of 1×3×4×4: division by zero"),
    ],
)
def test_other_outputs_are_rejected(compute, model, message):
    with pytest.raises(ExportError, match=message):
        max_abs_difference("file", compute, model, IMAGES)


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_model_that_differs_from_itself_is_named():
    with pytest.raises(ExportError, match="other outputs at each call"):
        max_abs_difference("file", lambda image: image, Random(), IMAGES)


def test_several_outputs_and_inputs():
    class Two(nn.Module):
        def forward(self, x, y):
            return {"sum": x + y, "first": (x, None)}

    pairs = [(torch.ones(1, 3), torch.ones(1, 3))]
    assert max_abs_difference("file", lambda x, y: [x + y, x], Two(), pairs) == 0
    with pytest.raises(ExportError, match="file has 1 outputs, the model 2"):
        max_abs_difference("file", lambda x, y: x + y, Two(), pairs)


def test_levels_may_differ_by_one():
    assert max_abs_difference("file", lambda image: image.astype(np.uint8) + 1, Levels(), IMAGES) == 1
