import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import pruned_model, relative_difference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.deployment.deploy import deploy
from prunekit.deployment.deployed_model import DeployConfig
from prunekit.deployment.passes import native_kernels
from prunekit.deployment.rewrite import rewrite
from prunekit.native.library import NoKernels, load

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
CONFIG = DeployConfig(8, channels_last=True, native_kernels=True)
compiled = pytest.mark.skipif(isinstance(load(), NoKernels), reason="there is no C++ compiler")


@compiled
@pytest.mark.parametrize("seed", range(3))
def test_equal_outputs_on_a_pruned_csnet(seed):
    model, example = pruned_model("csnet", seed, width=10)
    network = rewrite(model, example, CONFIG).recompile()
    assert sum(isinstance(m, native_kernels.NativeOp) for m in network.modules()) > 20
    assert not any(isinstance(m, nn.PReLU) for m in network.modules())
    for shape in ((2, 3, 32, 32), (1, 3, 48, 64), (3, 3, 37, 51), (1, 3, 33, 17)):
        assert relative_difference(model, network, *shape) < 1e-5


@compiled
@pytest.mark.parametrize(("name", "options"), [("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})])
def test_equal_outputs_on_resnets(name, options):
    model, example = pruned_model(name, 0, 0.3, **options)
    network = rewrite(model, example, CONFIG).recompile()
    assert relative_difference(model, network, 2, 3, 32, 32) < 1e-5 > relative_difference(model, network, 1, 3, 29, 35)


@compiled
def test_outputs_do_not_depend_on_the_number_of_threads():
    model, example = pruned_model("csnet", 1, width=10)
    network = rewrite(model, example, CONFIG).recompile()
    image, before = torch.randn(3, 3, 37, 51), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(network(image))
    finally:
        torch.set_num_threads(before)
    # The last convolution is PyTorch's, and may differ in the last digits.
    assert all(torch.allclose(results[0], other, atol=1e-6) for other in results[1:])


@compiled
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 13), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40)
def test_fused_convolution_sum_upsampling_and_depthwise_pair(images, height, width, blocks, seed):
    torch.manual_seed(seed)
    channels = 8 * blocks
    conv = nn.Conv2d(5, channels, 3, padding=2, dilation=2)
    deep = [nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in range(2)]
    slopes = [torch.rand(channels) * 2 - 0.5 for _ in range(3)]
    x, add = torch.randn(images, 5, height, width), torch.randn(images, channels, height, width)
    coarse = torch.randn(images, channels, (height + 1) // 2, (width + 1) // 2)
    kernel = native_kernels.NativeConv([conv])
    kernel.slope = slopes[0]
    for one, slope in zip(deep, slopes[1:], strict=True):
        unit = native_kernels.NativeDepthwise(one)
        unit.slope = slope
        kernel.depthwise.append(unit)
    with torch.no_grad():
        y = conv(x) + add + F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        y = F.prelu(y, slopes[0])
        for one, slope in zip(deep, slopes[1:], strict=True):
            y = F.prelu(one(y), slope)
        assert torch.allclose(kernel(x, add, coarse), y, atol=1e-5, rtol=1e-5)


@compiled
@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=20)
def test_native_pooling(height, width, mean):
    x = torch.randn(2, 8, height, width)
    wanted = (F.avg_pool2d if mean else F.max_pool2d)(x, 2, ceil_mode=True)
    assert torch.allclose(native_kernels.NativePool(mean, 8)(x), wanted, atol=1e-6)
    x[0, 0, 0, 0] = float("nan")
    assert native_kernels.NativePool(mean, 8)(x)[0, 0, 0, 0].isnan()


@compiled
def test_wrong_inputs_are_rejected():
    kernel = native_kernels.NativePool(False, 8)
    for wrong in (torch.randn(1, 8, 4, 4).double(), torch.randn(1, 7, 4, 4), torch.randn(8, 4, 4)):
        with pytest.raises(RuntimeError, match=r"takes float32 \(N, 8, H, W\)"):
            kernel(wrong)


def test_without_a_compiler_other_configs_are_timed_and_the_reason_recorded(monkeypatch):
    monkeypatch.setattr(native_kernels, "load", lambda: NoKernels("there is no C++ compiler; install g++"))
    model, example = pruned_model("csnet", 0, width=10)
    deployed, record = deploy(model, example)
    assert record.native_unavailable == "there is no C++ compiler; install g++" and not record.config.native_kernels
    assert len(record.candidates) == 4 and relative_difference(model, deployed, 1, 3, 32, 32) < 1e-5
