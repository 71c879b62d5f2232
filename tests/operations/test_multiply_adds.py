"""What operations multiply, compared with the counters of torch and fvcore."""

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from helpers.zoo_products import PRODUCTS, example_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunekit.flops import count
from prunekit.operations.keys import without_fast_path
from prunekit.operations.multiply_adds import multiply_adds


class Apply(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(1))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def products(function, *shape, **modules):
    return multiply_adds(Apply(function, **modules), torch.randn(*shape)).products


@pytest.mark.parametrize("name", PRODUCTS)
def test_counts_are_those_of_torch(name):
    model, example = PRODUCTS[name]().eval(), example_of(name)
    # Its attention on CPUs is one operation that torch does not count.
    with without_fast_path(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        model(example[:1])
    found = count(model, example)
    assert 2 * found.macs == mode.get_total_flops() > 0 and found.uncounted == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["shared_width", "group_norms", "mixer", "windows", "einsum", "bare", "transposed"])
def test_counts_are_those_of_fvcore_where_it_supports_the_operations(name):
    model, example = PRODUCTS[name]().eval(), example_of(name)
    analysis = FlopCountAnalysis(model, example[:1])
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    kinds = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")
    assert count(model, example).macs == sum(analysis.by_operator().get(kind, 0) for kind in kinds)


def test_products_belong_to_the_module_that_runs():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    found = products(lambda net, x: net.layer(x, x, x, need_weights=False)[0] @ x.mT, 1, 5, 8, layer=layer)
    assert found == {
        ("layer", "linear", 0): [5 * 8 * 24],
        ("layer", "scaled_dot_product_attention", 0): [2 * 5 * 5 * 4, 2 * 5 * 5 * 4],
        ("layer", "linear", 1): [5 * 8 * 8],
        ("", "matmul", 0): [5 * 5 * 8],
    }


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x @ x[0, 0], 2 * 3 * 4),
        (lambda x: x[0, 0] @ x[0, 1], 4),
        (lambda x: x[0].mv(x[0, 0]), 3 * 4),
        (lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0]), 3 * 4),
        (lambda x: torch.tensordot(x, x, ([2], [2])), 6 * 6 * 4),
        (lambda x: x.new_ones(2, 3, 3).baddbmm_(x, x.mT), 2 * 3 * 3 * 4),
        (lambda x: F.linear(x, x[0, 0]), 2 * 3 * 4),
        (lambda x: F.conv_transpose1d(x, x.new_ones(3, 5, 2), groups=3), 2 * 3 * 4 * 5 * 2),
        (lambda x: torch.outer(x[0, 0], x[0, 1]) * 2, 0),
    ],
)
def test_forms_of_products(function, expected):
    found = products(lambda _, x: function(x), 2, 3, 4)
    assert sum(map(sum, found.values())) == expected


def test_recurrent_layers_count_as_their_products():
    found = products(lambda net, x: net.layer(x)[0], 1, 6, 8, layer=nn.LSTM(8, 5, batch_first=True))
    assert sum(map(sum, found.values())) == 6 * (8 * 20 + 5 * 20)


@pytest.mark.parametrize("length", [3, 30])  # torch computes distances in two ways
def test_unknown_operations_are_told(length):
    model = Apply(lambda net, x: net.layer(x, x) + torch.cdist(x, x).mean(), layer=nn.Bilinear(4, 4, 3))
    found = count(model, torch.randn(2, length, 4))
    assert found.uncounted == ("", "layer") and "without some MACs of 2 modules, such as the model" in str(found)


class Uncopied(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise RuntimeError("not copied")


OUTER = nn.Conv2d(3, 4, 1)


def differentiated(net, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(net.layer(x).sum(), x)[0]


@pytest.mark.parametrize(
    "function, layer",
    [
        (lambda net, x: net.layer(x) if x.sum().item() == 0 else x, nn.Conv2d(3, 4, 1)),  # reads values
        (lambda net, x: net.layer(x), Uncopied(3, 4, 1)),
        (lambda net, x: OUTER(x), OUTER),  # a copy would call the model's own layer
        (differentiated, nn.Conv2d(3, 4, 1)),
        (lambda net, x: net.layer(x), torch.jit.script(nn.Conv2d(3, 4, 1))),
    ],
)
def test_models_that_do_not_run_on_the_meta_device_are_run(function, layer):
    model = Apply(function, layer=layer)
    model.layer.train()
    x = torch.zeros(1, 3, 5, 5)
    assert sum(multiply_adds(model, x).of_modules().values()) == 4 * 3 * 25
    assert model.training and model.layer.training and not layer.weight.is_inference()
    if not isinstance(layer, torch.jit.ScriptModule):
        assert list(multiply_adds(model, x).of_modules()) == ["layer"] and not layer._forward_hooks


def test_error_of_the_model_is_raised():
    with pytest.raises(RuntimeError, match="to have 5 channels"):
        multiply_adds(nn.Sequential(nn.Conv2d(5, 8, 3)), torch.zeros(1, 3, 9, 9))
