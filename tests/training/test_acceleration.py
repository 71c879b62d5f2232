import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import small_csnet
from torch import nn

from prunekit.backbones.octresnet import octresnet
from prunekit.backbones.resnet import resnet
from prunekit.config.schema import Training
from prunekit.native.library import NoKernels, load
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
from prunekit.training import acceleration
from prunekit.training.acceleration import fast_steps, flush_denormals, reuse_memory

SIZE = 32
kernels = pytest.mark.skipif(isinstance(load(), NoKernels), reason="no compiler")


def step(model, forward, decay, optimizer, seed):
    """Perform one step on random images; return its gradients."""
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = forward(x).square().mean() + decay.penalty()
    optimizer.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return gradients


def prepared(build):
    torch.manual_seed(0)
    model = build().double().train()
    groups = find_groups(model, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64))
    return model, groups, torch.optim.Adam(model.parameters(), 1e-3)


def recorder():
    messages = []
    return messages, messages.append


@kernels
@pytest.mark.parametrize(
    "build",
    [small_csnet, lambda: octresnet(8, 8), lambda: resnet(8, 8)],
    ids=["csnet", "octresnet", "resnet"],
)
def test_fast_step_equals_plain_step(build):
    plain, groups, optimizer = prepared(build)
    fast, same, other = prepared(build)
    messages, say = recorder()
    with (
        DynamicWeightDecay(plain, groups, 0.1) as decay,
        DynamicWeightDecay(fast, same, 0.1) as theirs,
        fast_steps(fast, same, Training(epochs=1), say) as forward,
    ):
        for seed in range(3):
            wanted = step(plain, plain, decay, optimizer, seed)
            found = step(fast, forward, theirs, other, seed)
            for name, gradient in wanted.items():
                assert (found[name] - gradient).abs().max() <= 1e-10 * max(1, float(gradient.abs().max())), name
        for (name, a), b in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
            assert a.dtype == b.dtype and (a - b).abs().max() <= 1e-8 * max(1, float(a.abs().max())), name
    assert not messages


@kernels
def test_kernels_are_used_only_within_the_context(monkeypatch):
    model, groups, _ = prepared(small_csnet)
    calls = []
    held = acceleration.norm_act, acceleration.depthwise
    monkeypatch.setattr(acceleration, "norm_act", lambda *a: calls.append("norm") or held[0](*a))
    monkeypatch.setattr(acceleration, "depthwise", lambda *a: calls.append("depthwise") or held[1](*a))
    x = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64)
    with fast_steps(model, groups, Training(epochs=1), print) as forward:
        forward(x)
        assert (calls.count("norm"), calls.count("depthwise")) == (58, 34)
        pairs = [m.forward.__self__ for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(pair.act is not None for pair in pairs)
        model.eval()
        wanted = copy.deepcopy(model)(x)
        assert torch.equal(model(x), wanted) and len(calls) == 92
        model.train()
    assert not any("forward" in vars(m) for m in model.modules())
    model(x)
    assert len(calls) == 92


@kernels
def test_prelu_with_another_input_computes(monkeypatch):
    """The fused norm covers only its own output."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 1, 1)).double()
    groups = find_groups(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with fast_steps(model, groups, Training(epochs=1), print):
        assert "forward" in vars(model[2])
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        assert torch.equal(model[2](x), F.prelu(x, model[2].weight))


@kernels
def test_norm_with_a_hook_returns_its_own_output():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 1, 1)).double()
    groups = find_groups(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with fast_steps(model, groups, Training(epochs=1), print) as forward:
        forward(x)
    # The first forward, in evaluation mode, checks whether the model takes channels-last.
    assert seen[-1].min() < 0 and seen[-1].mean().abs() < 1e-9


def test_training_without_kernels_is_reported(monkeypatch):
    monkeypatch.setattr(acceleration, "load", lambda: NoKernels("there is no C++ compiler"))
    model, groups, optimizer = prepared(small_csnet)
    messages, say = recorder()
    with (
        DynamicWeightDecay(model, groups) as decay,
        fast_steps(model, groups, Training(epochs=1), say) as forward,
    ):
        step(model, forward, decay, optimizer, 0)
    assert messages == ["training without the kernels for CPUs: there is no C++ compiler"]


def test_fast_false_yields_the_model():
    model, groups, _ = prepared(small_csnet)
    with fast_steps(model, groups, Training(epochs=1, fast=False), print) as forward:
        assert forward is model and not any("forward" in vars(m) for m in model.modules())


class Views(nn.Module):
    """Takes a view of its features, which fails for channels-last features."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4 * 64, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def test_model_that_refuses_channels_last_trains_without():
    model, (messages, say) = Views(), recorder()
    x = torch.randn(2, 3, 8, 8)
    with fast_steps(model, [], Training(epochs=1), say) as forward:
        assert torch.equal(forward(x), model(x)) and torch.equal(forward(x), model(x))
    assert len(messages) == 1 and "refuses" in messages[0]


def test_other_errors_of_the_model_are_raised():
    with (
        pytest.raises(RuntimeError, match="channels"),
        fast_steps(Views(), [], Training(epochs=1), print) as forward,
    ):
        forward(torch.zeros(2, 5, 8, 8))


def test_model_that_does_not_compile_trains_without(monkeypatch):
    def broken(model, **options):
        def run(x):
            raise RuntimeError("no compiler found\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model, (messages, say) = resnet(8, 8), recorder()
    x = torch.randn(2, 3, 8, 8)
    with fast_steps(model, [], Training(epochs=1, compile=True), say) as forward:
        assert forward(x).shape == forward(x).shape == (2, 10)
    assert messages == ["train.compile: the model does not compile (no compiler found); training without"]


def test_subnormals_are_flushed_in_every_thread():
    torch.set_num_threads(3)
    try:
        small = torch.full((12, 1 << 16), 1e-39)
        rows = lambda: (small * 0.5).ne(0).any(1).tolist()  # noqa: E731
        assert all(rows())
        with flush_denormals():
            assert not any(rows())
        assert all(rows())
    finally:
        torch.set_num_threads(1)


def test_memory_settings_are_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), reuse_memory():
        torch.zeros(1 << 20)
        raise ZeroDivisionError


@pytest.mark.parametrize("stride", [2, (1, 2), 3])
def test_strided_pointwise_convolution_is_equivalent(stride):
    conv = nn.Conv2d(4, 6, 1, stride)
    x = torch.randn(2, 4, 8, 9)
    wanted = conv(x)
    with fast_steps(conv, [], Training(epochs=1), print) as forward:
        assert "forward" in vars(conv)
        torch.testing.assert_close(forward(x), wanted)
    assert "forward" not in vars(conv)
