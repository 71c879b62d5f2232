import pytest
import torch
from torch import nn

from prunekit.deployment.values import accepted, compute, difference, output_names
from prunekit.errors import ExportError


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: {"out": x}, ["output"]),
        (lambda x: (x, None), ["output"]),
        (lambda x: (x, [x, x]), ["output_0", "output_1_0", "output_1_1"]),
        (lambda x: {"out": x, "aux": (x, x)}, ["out", "aux_0", "aux_1"]),
    ],
)
def test_outputs_have_names(form, names):
    image = torch.zeros(1, 3)
    assert output_names(Returns(form), [image]) == names and len(compute(Returns(form), image)) == len(names)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: None, "returns no tensor"),
        (lambda x: 3, "returns int"),
        (lambda x: x[9, 9], "fails on an input of 1×3"),
    ],
)
def test_models_that_cannot_be_compared(form, message):
    with pytest.raises(ExportError, match=message):
        compute(Returns(form), torch.zeros(1, 3))
    assert accepted(Returns(form), [torch.zeros(1, 3)]) == []


def test_difference_of_shapes_and_values():
    ones = torch.ones(2)
    assert difference([ones], [ones, ones]) == (float("inf"), False)
    assert difference([ones * 2], [ones]) == (1.0, False)
    assert difference([ones * 1e6 + 1], [ones * 1e6]) == (1.0, True)
    largest, close = difference([ones * float("nan"), ones], [ones, ones])
    assert largest != largest and not close
