"""Kernels for inference compute what the model does, and are done without where they cannot be had."""

import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import gap, learned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.deployment.deploy import deploy
from prunekit.deployment.form import Form
from prunekit.deployment.passes import native_kernels
from prunekit.deployment.rewrite import rewrite
from prunekit.native.library import NoKernels, load

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
FORM = Form(8, channels_last=True, kernels=True)
compiled = pytest.mark.skipif(isinstance(load(), NoKernels), reason="there is no C++ compiler")


@compiled
@pytest.mark.parametrize("seed", range(3))
def test_a_learned_csnet(seed):
    model, example = learned("csnet", seed, width=10)
    network = rewrite(model, example, FORM).finish()
    assert sum(isinstance(m, native_kernels._Kernel) for m in network.modules()) > 20
    assert not any(isinstance(m, nn.PReLU) for m in network.modules())
    for shape in ((2, 3, 32, 32), (1, 3, 48, 64), (3, 3, 37, 51), (1, 3, 33, 17)):
        assert gap(model, network, *shape) < 1e-5


@compiled
@pytest.mark.parametrize(("name", "options"), [("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})])
def test_other_backbones(name, options):
    model, example = learned(name, 0, 0.3, **options)
    network = rewrite(model, example, FORM).finish()
    assert gap(model, network, 2, 3, 32, 32) < 1e-5 > gap(model, network, 1, 3, 29, 35)


@compiled
def test_the_number_of_threads_moves_no_bit():
    model, example = learned("csnet", 1, width=10)
    network = rewrite(model, example, FORM).finish()
    image, before = torch.randn(3, 3, 37, 51), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(network(image))
    finally:
        torch.set_num_threads(before)
    # What is left to PyTorch (the logits' convolution) may differ in its last digits, the features before do not.
    assert all(torch.allclose(results[0], other, atol=1e-6) for other in results[1:])


@compiled
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 13), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_block_in_one_call(images, height, width, blocks, seed):
    torch.manual_seed(seed)
    channels = 8 * blocks
    conv = nn.Conv2d(5, channels, 3, padding=2, dilation=2)
    deep = [nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in range(2)]
    slopes = [torch.rand(channels) * 2 - 0.5 for _ in range(3)]
    x, add = torch.randn(images, 5, height, width), torch.randn(images, channels, height, width)
    coarse = torch.randn(images, channels, (height + 1) // 2, (width + 1) // 2)
    kernel = native_kernels.Convolution([conv])
    kernel.slope = slopes[0]
    for one, slope in zip(deep, slopes[1:], strict=True):
        unit = native_kernels.Depthwise(one)
        unit.slope = slope
        kernel.units.append(unit)
    with torch.no_grad():
        y = conv(x) + add + F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        y = F.prelu(y, slopes[0])
        for one, slope in zip(deep, slopes[1:], strict=True):
            y = F.prelu(one(y), slope)
        assert torch.allclose(kernel(x, add, coarse), y, atol=1e-5, rtol=1e-5)


@compiled
@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=20, deadline=None)
def test_pooling(height, width, mean):
    x = torch.randn(2, 8, height, width)
    wanted = (F.avg_pool2d if mean else F.max_pool2d)(x, 2, ceil_mode=True)
    assert torch.allclose(native_kernels.Pool(mean, 8)(x), wanted, atol=1e-6)
    x[0, 0, 0, 0] = float("nan")
    assert native_kernels.Pool(mean, 8)(x)[0, 0, 0, 0].isnan()


@compiled
def test_what_kernels_would_read_wrongly_is_refused():
    kernel = native_kernels.Pool(False, 8)
    for wrong in (torch.randn(1, 8, 4, 4).double(), torch.randn(1, 7, 4, 4), torch.randn(8, 4, 4)):
        with pytest.raises(RuntimeError, match=r"takes float32 \(N, 8, H, W\)"):
            kernel(wrong)


def test_without_a_compiler_the_rest_is_measured_and_it_is_said(monkeypatch):
    monkeypatch.setattr(native_kernels, "load", lambda: NoKernels("there is no C++ compiler; install g++"))
    model, example = learned("csnet", 0, width=10)
    deployed, record = deploy(model, example)
    assert record.kernels == "there is no C++ compiler; install g++" and not record.form.kernels
    assert len(record.measured) == 5 and gap(model, deployed, 1, 3, 32, 32) < 1e-5
