import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.layers import GOctConv, branch_size
from prunekit.layers.octave_ops import (
    Attr,
    Branches,
    OctaveLayer,
    Octavized,
    Ref,
    Step,
    Training,
    add,
    each,
    merge,
    one_branch,
    pool,
    pool_globally,
)

sides = st.tuples(st.integers(1, 21), st.integers(1, 21))


def feature(channels, size, batch=2):
    xs = [torch.randn(batch, n, *branch_size(size, b)) if n else None for b, n in enumerate(channels)]
    return Branches(xs, batch, size)


def in_step(found, channels):
    """Whether each branch has the channels that it should, and half the size of the one before."""
    shapes = [None if x is None else tuple(x.shape) for x in found.xs]
    return shapes == [(found.batch, n, *branch_size(found.size, b)) if n else None for b, n in enumerate(channels)]


@settings(max_examples=60)
@given(
    size=sides,
    window=st.sampled_from([(1, 2, 0, False), (3, 1, 1, False), (3, 2, 1, False), (2, 2, 0, True), (2, 2, 0, False)]),
    channels=st.lists(st.integers(0, 2), min_size=1, max_size=4).filter(any),
    name=st.sampled_from(["max_pool2d", "avg_pool2d"]),
)
def test_pooling_keeps_branch_sizes_consistent(size, window, channels, name):
    kernel, stride, padding, ceil = window
    floor = kernel == stride and not ceil
    if floor and min(size) < kernel:
        return
    function = getattr(F, name)
    options = {"kernel_size": kernel, "padding": padding, "ceil_mode": ceil}
    given_ = feature(channels, size)
    found = pool(function, given_, stride, floor, **options)
    assert in_step(found, channels)
    # Branch 0 is pooled as it would be alone, and its size is known where it is absent.
    plain = function(torch.randn(1, 1, *size), stride=stride, **options)
    assert found.size == plain.shape[-2:]
    if channels[0]:
        assert torch.equal(found.xs[0], function(given_.xs[0], stride=stride, **options))


def test_pooling_with_floor_equals_plain_pooling_on_divisible_sizes():
    given_ = feature([2, 3], (8, 12))
    found = pool(F.max_pool2d, given_, 2, True, kernel_size=2, padding=0, ceil_mode=False)
    for x, y in zip(given_.xs, found.xs, strict=True):
        torch.testing.assert_close(y, F.max_pool2d(x, 2))


@settings(max_examples=30)
@given(size=sides, channels=st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
def test_merge_concatenates_branches_in_order_at_the_finest_size(size, channels):
    given_ = feature(channels, size)
    made = merge(given_)
    assert made.shape == (2, sum(channels), *size)
    start = 0
    for b, n in enumerate(channels):
        part = made[:, start : start + n]
        if n:
            wanted = given_.xs[b]
            if b:
                wanted = F.interpolate(wanted, size=size, mode="bilinear", align_corners=False)
            torch.testing.assert_close(part, wanted)
        start += n
    flat = pool_globally(torch.mean, given_, (2, 3))
    torch.testing.assert_close(flat, torch.cat([x.mean((2, 3)) for x in given_.xs if x is not None], 1))


def test_operations_skip_absent_branches():
    a, b = feature([2, 0, 3], (5, 6)), feature([0, 0, 3], (5, 6))
    made = add(a, b)
    assert torch.equal(made.xs[0], a.xs[0]) and made.xs[1] is None
    assert torch.equal(made.xs[2], a.xs[2] + b.xs[2])
    assert torch.equal(add(b, a).xs[0], a.xs[0])
    made = each(F.leaky_relu, a, 0.5)
    assert made.xs[1] is None and torch.equal(made.xs[2], F.leaky_relu(a.xs[2], 0.5))


@settings(max_examples=40)
@given(
    ins=st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any),
    outs=st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any),
    size=sides,
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2, 3]),
)
def test_layer_keeps_branch_sizes_consistent(ins, outs, size, kernel, stride):
    norms = {str(b): nn.BatchNorm2d(n).eval() for b, n in enumerate(outs) if n}
    layer = OctaveLayer(GOctConv(ins, outs, kernel, stride=stride, downsample="mixed"), norms=norms)
    made = layer(feature(ins, size))
    assert in_step(made, outs) and made.size == branch_size(size, 0, stride)


def test_depthwise_layer_with_stride():
    convs = {b: nn.Conv2d(2, 2, 3, 2, 1, groups=2) for b in "02"}
    layer = OctaveLayer(convs=convs, stride=2, acts={"0": nn.PReLU(), "2": nn.PReLU()})
    made = layer(feature([2, 0, 2], (13, 6)))
    assert in_step(made, [2, 0, 2]) and made.size == (7, 3)


def test_layer_accepts_a_plain_tensor():
    layer = OctaveLayer(GOctConv([3], [2, 2], 3, downsample="mixed"))
    image = torch.randn(2, 3, 7, 5)
    made, same = layer(image), layer(one_branch(image))
    assert in_step(made, [2, 2]) and all(map(torch.equal, made.xs, same.xs))


@pytest.mark.parametrize("affine", [True, False])
def test_norm_of_an_absent_branch_is_its_constant(affine):
    """Whatever a branch is made of may be gone, but not what it is added to."""
    norm = nn.BatchNorm2d(2, affine=affine).eval()
    norm.running_mean += torch.tensor([1.0, -2.0])
    layer = OctaveLayer(GOctConv([3], [2], downsample="mixed"), norms={"1": norm})
    layer.mix.branches = 2
    made = layer(feature([3], (5, 6)))
    assert made.xs[1].shape == (2, 2, 3, 3)
    torch.testing.assert_close(made.xs[1], norm(torch.zeros(2, 2, 3, 3)))


def test_steps_run_in_order_and_release_values():
    class Scale(nn.Module):
        def forward(self, x, by):
            return by * x

    steps = [
        Step(Attr("block.scale"), (Ref(0),), {"by": Attr("block.factor")}),
        Step(lambda pair, training: pair[0] if training else pair[1]["x"], ([Ref(1), {"x": Ref(0)}], Training())),
    ]
    net = Octavized(steps, {"block.scale": Scale()}, {"block.factor": nn.Parameter(torch.tensor(3.0))})
    assert dict(net.named_parameters()).keys() == {"block.factor"}
    image = torch.ones(2)
    assert net.train()(image).tolist() == [3, 3] and net.eval()(image).tolist() == [1, 1]
    assert [step.last for step in net._steps] == [(), (0, 1)]


def test_value_without_further_users_is_freed():
    seen = []

    def make(x):
        y = x + 1
        seen.append(weakref.ref(y))
        return y

    def check(x):
        assert seen[0]() is None
        return x

    steps = [Step(make, (Ref(0),)), Step(torch.neg, (Ref(1),)), Step(check, (Ref(2),))]
    assert Octavized(steps, {}, {})(torch.ones(1)).tolist() == [-2]
