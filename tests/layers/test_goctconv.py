import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.layers import GOctConv, branch_size, split_channels


def feature(channels, size, batch=2):
    return [torch.randn(batch, n, *branch_size(size, b)) if n else None for b, n in enumerate(channels)]


@settings(max_examples=25)
@given(
    n_in=st.integers(1, 5),
    n_out=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_one_branch_equals_conv2d(n_in, n_out, kernel, size):
    layer = GOctConv([n_in], [n_out], kernel)
    x = torch.randn(2, n_in, *size)
    (y,) = layer([x])
    plain = F.conv2d(x, layer.paths["0to0"].weight, padding=kernel // 2)
    assert torch.equal(y, plain)


@pytest.mark.parametrize("kernel", [1, 3])
def test_two_branches_equal_the_papers_formula_on_even_sizes(kernel):
    layer = GOctConv([4, 3], [5, 2], kernel)
    fine, coarse = feature([4, 3], (8, 12))
    weight = {key: conv.weight for key, conv in layer.paths.items()}
    pad = kernel // 2
    up = F.interpolate(
        F.conv2d(coarse, weight["1to0"], padding=pad), scale_factor=2, mode="bilinear", align_corners=False
    )
    y0 = F.conv2d(fine, weight["0to0"], padding=pad) + up
    y1 = F.conv2d(F.max_pool2d(fine, 2), weight["0to1"], padding=pad) + F.conv2d(coarse, weight["1to1"], padding=pad)
    out = layer([fine, coarse])
    torch.testing.assert_close(out[0], y0)
    torch.testing.assert_close(out[1], y1)


def test_stride_average_pools_every_input_branch():
    layer = GOctConv([4, 3], [5, 2], 3, stride=2)
    plain = GOctConv([4, 3], [5, 2], 3)
    plain.load_state_dict(layer.state_dict())
    xs = feature([4, 3], (16, 8))
    for a, b in zip(layer(xs), plain([F.avg_pool2d(x, 2) for x in xs]), strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_downsampling_pools_between_branches_and_strides_within():
    layer = GOctConv([4, 3], [5, 2], 3, stride=2, downsample="mixed")
    fine, coarse = feature([4, 3], (16, 8))
    weight = {key: conv.weight for key, conv in layer.paths.items()}
    y0 = F.conv2d(fine, weight["0to0"], stride=2, padding=1)
    y1 = F.conv2d(coarse, weight["1to1"], stride=2, padding=1)
    down = F.conv2d(F.max_pool2d(fine, 2), weight["0to1"], stride=2, padding=1)
    up = F.interpolate(
        F.conv2d(coarse, weight["1to0"], stride=2, padding=1), scale_factor=2, mode="bilinear", align_corners=False
    )
    for a, b in zip(layer([fine, coarse]), (y0 + up, y1 + down), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=60)
@given(
    ins=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    outs=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
    size=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    stride=st.sampled_from([1, 2]),
    downsample=st.sampled_from(["pool", "stride", "mixed"]),
)
def test_output_shapes_for_any_branches_split_and_size(ins, outs, size, stride, downsample):
    layer = GOctConv(ins, outs, 3, stride=stride, downsample=downsample)
    ys = layer(feature(ins, size), size)
    assert len(ys) == len(outs)
    for b, (y, n) in enumerate(zip(ys, outs, strict=True)):
        if n:
            assert y.shape == (2, n, *branch_size(size, b, stride))
        else:
            assert y is None
    assert len(layer.paths) == sum(map(bool, ins)) * sum(map(bool, outs))


def test_size_argument_replaces_an_absent_finest_branch():
    layer = GOctConv([0, 3], [2, 2])
    coarse = torch.randn(1, 3, 4, 4)
    assert layer([None, coarse], (7, 8))[0].shape[-2:] == (7, 8)
    assert layer([None, coarse])[0].shape[-2:] == (8, 8)


def test_fan_in_counts_all_input_branches():
    torch.manual_seed(0)
    layer = GOctConv([50, 50], [200, 200], 3)
    bound = (1 / (100 * 9)) ** 0.5
    for conv in layer.paths.values():
        assert conv.weight.abs().max() <= bound
        assert conv.weight.abs().max() > 0.98 * bound
        assert conv.bias is None


@pytest.mark.parametrize(
    "arguments, options, word",
    [
        (([0], [3]), {}, "at least one channel"),
        (([3], [-1, 4]), {}, "at least one channel"),
        (([3], [3], 2), {}, "odd kernel"),
        (([3], [3]), {"downsample": "max"}, "'pool', 'stride' or 'mixed'"),
        (([3], [3]), {"stride": 0}, "at least 1"),
    ],
)
def test_invalid_arguments_raise(arguments, options, word):
    with pytest.raises(ValueError, match=word):
        GOctConv(*arguments, **options)


@given(channels=st.integers(1, 500), shares=st.lists(st.integers(0, 10), min_size=1, max_size=5).filter(any))
def test_split_channels_preserves_the_total(channels, shares):
    split = [share / sum(shares) for share in shares]
    parts = split_channels(channels, split)
    assert sum(parts) == channels
    assert all(part == 0 for part, share in zip(parts, shares, strict=True) if share == 0)


@pytest.mark.parametrize("split", [[], [0.5, 0.6], [1.5, -0.5]])
def test_invalid_split_raises(split):
    with pytest.raises(ValueError, match="add up to 1"):
        split_channels(10, split)
