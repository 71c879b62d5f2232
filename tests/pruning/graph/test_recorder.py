import torch
import torch.nn.functional as F
from torch import nn

from prunekit.operations.shapes import fast_result
from prunekit.pruning.graph.recorder import record
from prunekit.pruning.graph.rules.base import find_rule
from prunekit.pruning.graph.trace import record_call, tensors_in, trace


class Apply(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def ops(function, *shape, **modules):
    return record_call(Apply(function, **modules).eval(), torch.randn(*shape)).ops


def test_operations_are_those_that_users_call():
    found = ops(lambda net, x: F.layer_norm(net.linear(x), (5,)).chunk(5, -1)[0], 2, 3, 4, linear=nn.Linear(4, 5))
    assert [(op.name, op.module) for op in found] == [("linear", "linear"), ("layer_norm", ""), ("chunk", "")]
    assert found[0].inputs[1].name == "linear.weight" and "test_recorder.py" in found[1].line


def test_calls_of_an_operation_are_numbered_by_module():
    found = ops(lambda net, x: net.act(net.act(x)).relu(), 2, 3, act=nn.ReLU())
    assert [(op.module, op.number) for op in found] == [("act", 0), ("act", 1), ("", 0)]


def test_operation_without_a_rule_is_recorded_as_its_parts():
    (first, *_), known = ops(lambda net, x: x.mT, 2, 3, 4), find_rule("mT", torch.ops.aten.mT.default)
    assert known is None and first.name == "transpose"


def test_what_shares_memory_with_a_changed_tensor_is_another_value():
    def change(net, x):
        y = x * 2
        part = y[:, :2]
        part += 1
        return y

    found = ops(change, 2, 4)
    assert [op.name for op in found] == ["mul", "slice", "add_", "_mutated"]
    assert found[-1].inputs == [found[0].outputs[0], found[2].outputs[0]]


def test_tied_parameters_are_one_tensor():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with torch.inference_mode():
        found = record(model, (torch.randn(2, 4),), tensors_in, lambda name, func: True)
    assert found.tensors.keys() == {"0.weight", "0.bias", "1.bias"} and found.ops[0].args[1] is found.ops[1].args[1]


def test_fast_path_of_attention_is_recorded_as_operations():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert {"linear", "scaled_dot_product_attention", "layer_norm"} <= {
        op.name for op in trace(layer, torch.randn(2, 3, 8)).record.ops
    }


def test_fast_shapes_are_those_of_pytorch():
    x, w = torch.empty(2, 4, 9, 7, device="meta"), torch.empty(6, 2, 3, 3, device="meta")
    aten = torch.ops.aten
    for function, args in (
        (aten.conv2d.default, (x, w, None, [2, 1], [1, 0], [1, 2], 2)),
        (aten.relu.default, (x,)),
        (aten.add.Tensor, (x, x)),
        (aten.mul.Tensor, (x, 2.0)),
        (aten.mul.Tensor, (x, torch.empty(2, 4, 1, 1, device="meta"))),
        (aten.add.Tensor, (torch.empty(9, 1, device="meta"), x)),
        (aten.cat.default, ([x, x[:, :1].contiguous()], 1)),
        (aten.adaptive_avg_pool2d.default, (x, [1, 3])),
        (aten.mean.dim, (x, [2, -1])),
        (aten.mean.dim, (x, [1], True)),
        (aten.linear.default, (x, torch.empty(3, 7, device="meta"))),
        (aten.upsample_bilinear2d.vec, (x, None, False, [2.0, 1.5])),
        (aten.layer_norm.default, (x, [9, 7])),
        (aten.group_norm.default, (x, 2)),
        (aten.batch_norm.default, (x, None, None, None, None, True, 0.1, 1e-5, False)),
    ):
        fast, usual = fast_result(function._schema.name[6:], args, {}), function(*args)
        assert fast is not None and (fast.shape, fast.dtype, fast.stride()) == (
            usual.shape,
            usual.dtype,
            usual.stride(),
        )


def test_errors_are_left_to_pytorch():
    x = torch.empty(2, 4, 9, 7, device="meta")
    assert fast_result("linear", (x, torch.empty(3, 5, device="meta")), {}) is None
    assert fast_result("conv2d", (x, torch.empty(3, 5, 3, 3, device="meta")), {}) is None
    assert fast_result("batch_norm", (x, torch.empty(5, device="meta")), {}) is None
    assert fast_result("add", (x, torch.empty(5, device="meta")), {}) is None
    assert fast_result("layer_norm", (x, [5]), {}) is None
    assert fast_result("cat", ([x, x[:, :, 1:]], 1), {}) is None
    assert fast_result("adaptive_avg_pool2d", (x, [3]), {}) is None
    assert fast_result("mean", (x, [4]), {}) is None
