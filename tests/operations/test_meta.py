"""Shapes on the meta device are those that the operations give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prunekit.operations.meta import FastShapes, to_meta

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """A convolution and the shape of an input that it accepts."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel, stride, padding, dilation = (
        tuple(draw(st.lists(st.integers(low, 3), min_size=dims, max_size=dims))) for low in (1, 1, 0, 1)
    )
    module = CONVOLUTIONS[dims](
        2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())
    )
    return module, (draw(st.integers(1, 2)), 2 * groups, *(draw(st.integers(9, 12)) for _ in range(dims)))


@given(convolutions())
def test_convolutions_have_the_shape_of_the_real_ones(case):
    module, shape = case
    with torch.no_grad():
        expected = module(torch.zeros(shape))
        with FastShapes():
            output = to_meta(module)(torch.zeros(shape, device="meta"))
    assert output.shape == expected.shape and output.is_meta and output.dtype == expected.dtype


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 2, 8), (8, 8)])
def test_inputs_that_a_convolution_refuses_are_refused(shape):
    module = to_meta(nn.Conv2d(4, 4, 3))
    with torch.no_grad(), FastShapes(), pytest.raises(RuntimeError):
        module(torch.zeros(shape, device="meta"))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 1), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_have_the_shape_of_the_real_ones(shape, dtype):
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(shape, dtype=dtype)
    expected = a + b
    with torch.no_grad(), FastShapes():
        for output in (a.to("meta") + b.to("meta"), torch.add(a.to("meta"), b.to("meta"))):
            assert output.shape == expected.shape and output.dtype == expected.dtype and output.is_meta


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: F.linear(x, weight=x[0, 0]),
        lambda x: F.conv2d(x, weight=x[:, :, :2, :2], stride=(2, 2)),
        lambda x: F.conv2d(x, x[:, :, :2, :2], None, 2),
        lambda x: F.layer_norm(x, normalized_shape=(4,)),
        lambda x: F.scaled_dot_product_attention(x, key=x, value=x),
    ],
)
def test_arguments_may_have_names(compute):
    x = torch.zeros(1, 2, 4, 4)
    with torch.no_grad(), FastShapes():
        assert compute(x.to("meta")).shape == compute(x).shape


def test_gradients_are_kept():
    module = to_meta(nn.Conv2d(3, 4, 1))
    with torch.enable_grad(), FastShapes():
        output = module(torch.zeros(1, 3, 2, 2, device="meta"))
    assert output.grad_fn is not None and "Convolution" in output.grad_fn.name()
