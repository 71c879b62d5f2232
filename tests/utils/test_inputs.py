from typing import NamedTuple

import pytest
import torch
from torch import nn

from prunekit.errors import PlanError
from prunekit.utils.inputs import (
    as_example,
    batch_length,
    call,
    cast,
    describe_shapes,
    first_inputs,
    from_spec,
    map_tensors,
    shapes_of,
    tensors_of,
    to_spec,
)

IMAGES, TOKENS = torch.ones(4, 3, 8, 8), torch.ones(4, 6, dtype=torch.int64)


class Pair(NamedTuple):
    image: torch.Tensor
    scale: float


def test_named_tuples_stay_named_tuples():
    found = cast((Pair(IMAGES, 2.0),), torch.float64)[0]
    assert isinstance(found, Pair) and found.image.dtype == torch.float64 and found.scale == 2.0


class Returns(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (IMAGES, ((IMAGES,), {})),
        ((IMAGES, TOKENS), ((IMAGES, TOKENS), {})),
        ({"x": IMAGES, "flag": True}, ((), {"x": IMAGES, "flag": True})),
    ],
)
def test_call_passes_arguments(example, expected):
    assert call(Returns(), as_example(example)) == expected


@pytest.mark.parametrize("example", [[IMAGES], "image", None, {}, (), (1, "a")])
def test_an_example_without_arguments_is_refused(example):
    with pytest.raises(PlanError, match="a tuple of the model's arguments, or a dict of its keyword arguments"):
        as_example(example)


def test_nested_tensors_are_found_and_mapped():
    example = {"images": [IMAGES, (TOKENS,)], "more": {"x": IMAGES}, "size": 3}
    assert [tuple(shape) for shape in shapes_of(example)] == [(4, 3, 8, 8), (4, 6), (4, 3, 8, 8)]
    doubled = map_tensors(lambda tensor: 2 * tensor, example)
    assert all((tensor == 2).all() for tensor in tensors_of(doubled)) and doubled["size"] == 3
    assert isinstance(doubled["images"], list) and isinstance(doubled["images"][1], tuple)


def test_a_batch_is_shortened_where_its_length_is_known():
    mask = torch.ones(6, 6)
    assert shapes_of(first_inputs((IMAGES, TOKENS, torch.ones(5)), 2)) == [[2, 3, 8, 8], [2, 6], [5]]
    assert batch_length({"x": IMAGES, "y": TOKENS}) == 4
    # Neither a list of images nor arguments of different lengths say what a batch is.
    for example in (([IMAGES, IMAGES],), (IMAGES, mask)):
        assert shapes_of(first_inputs(example, 2)) == shapes_of(example) and batch_length(example) == 1


def test_cast_keeps_tokens():
    assert [tensor.dtype for tensor in tensors_of(cast((IMAGES, TOKENS), torch.float64))] == [
        torch.float64,
        torch.int64,
    ]


def test_messages_name_all_shapes():
    assert describe_shapes(IMAGES) == "an input of shape (4, 3, 8, 8)"
    assert describe_shapes((IMAGES, TOKENS)) == "inputs of shapes (4, 3, 8, 8), (4, 6)"


def test_specifications_round_trip():
    example = {"x": IMAGES, "more": (TOKENS, None, [2.0, True, "a"])}
    again = from_spec(to_spec(example))
    assert shapes_of(again) == shapes_of(example) and all(tensor.is_meta for tensor in tensors_of(again))
    assert [tensor.dtype for tensor in tensors_of(again)] == [torch.float32, torch.int64]
    assert again["more"][1:] == (None, (2.0, True, "a"))


def test_values_that_files_cannot_hold_are_refused():
    with pytest.raises(PlanError, match="an argument of the model is object, which cannot be saved"):
        to_spec((IMAGES, object()))


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": [2, -1], "dtype": "int64"},
        {"shape": [2], "dtype": "load"},
        {"shape": 3, "dtype": "int64"},
        {"shape": [True], "dtype": "int64"},
        {"shape": [2]},
        {"arguments": 3},
        {},
    ],
)
def test_damaged_specifications_are_refused(spec):
    with pytest.raises(ValueError, match="is not a tensor's shape and dtype"):
        from_spec([spec])
