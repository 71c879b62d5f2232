import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.native.library import NoKernels, load
from prunekit.native.ops import depthwise, norm_act, usable

pytestmark = pytest.mark.skipif(isinstance(load(), NoKernels), reason="no compiler")

shapes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


def norms(channels, generator, dtype):
    """Two norms of the same state."""
    found = []
    for _ in range(2):
        norm = nn.BatchNorm2d(channels, momentum=0.3).to(dtype)
        found.append(norm)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(channels, generator=generator, dtype=dtype) + 0.1 - float(name == "bias")
            for norm in found:
                getattr(norm, name).copy_(value)
    return found


def close(found, wanted, tolerance=1e-10):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert (one - other).abs().max() <= tolerance * max(1, float(other.abs().max()))


@settings(max_examples=60)
@given(shape=shapes, slopes=st.sampled_from(["none", "one", "each"]), seed=st.integers(0, 2**31), last=st.booleans())
def test_norm_act_matches_pytorch(shape, slopes, seed, last):
    n, c, h, w = shape
    if n * h * w == 1:
        return
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    mine, theirs = norms(c, generator, torch.float64)
    slope = None
    if slopes != "none":
        slope = torch.rand(1 if slopes == "one" else c, generator=generator, dtype=torch.float64).requires_grad_()
    y, means = norm_act(x, mine, slope)
    wanted = theirs(x)
    wanted = wanted if slope is None else F.prelu(wanted, slope)
    close([y, means], [wanted, wanted.mean((2, 3))])
    close([mine.running_mean, mine.running_var], [theirs.running_mean, theirs.running_var])
    pull = torch.randn(shape, generator=generator, dtype=torch.float64)
    more = [] if slope is None else [slope]
    close(
        torch.autograd.grad((y * pull).sum(), [x, mine.weight, mine.bias, *more]),
        torch.autograd.grad((wanted * pull).sum(), [x, theirs.weight, theirs.bias, *more]),
    )


@settings(max_examples=60)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_depthwise_matches_pytorch(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape[1], 1, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    mine, theirs = depthwise(x, weight), F.conv2d(x, weight, padding=1, groups=shape[1])
    pull = torch.randn(shape, generator=generator, dtype=torch.float64)
    close([mine], [theirs])
    close(*(torch.autograd.grad((y * pull).sum(), [x, weight]) for y in (mine, theirs)))


def test_norm_act_is_accurate_for_large_mean():
    generator = torch.Generator().manual_seed(0)
    x = 1e3 + torch.randn(4, 5, 64, 64, generator=generator)
    mine, theirs = norms(5, generator, torch.float32)
    exact = norms(5, torch.Generator().manual_seed(0), torch.float64)[0]
    with torch.no_grad():
        exact.weight.copy_(mine.weight)
        exact.bias.copy_(mine.bias)
    wanted = exact(x.double())
    ours, pytorchs = (float((y - wanted).abs().max()) for y in (norm_act(x, mine, None)[0], theirs(x)))
    assert ours <= max(2 * pytorchs, 1e-3)


def test_results_do_not_depend_on_thread_count():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 11, 13, generator=generator)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            norm = nn.BatchNorm2d(7)
            weight = torch.linspace(-1, 1, 63).view(7, 1, 3, 3).requires_grad_()
            y = depthwise(norm_act(x, norm, torch.full((7,), 0.25))[0], weight)
            found.append([y, *torch.autograd.grad(y.square().sum(), [norm.weight, norm.bias, weight])])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_usable_rejects_unsupported_inputs():
    x = torch.zeros(1, 2, 3, 3)
    assert usable(x) and usable(x.double())
    assert not usable(x.half()) and not usable(x[0]) and not usable(x[:0]) and not usable(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not usable(x)
