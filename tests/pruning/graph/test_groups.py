import subprocess
import sys

import pytest
import torch
from helpers.networks import Concat, Residual, Row, Shared, init_norms, small_csnet
from helpers.zoo import ZOO
from torch import nn

from prunekit.backbones.csnet import csnet
from prunekit.errors import PlanError
from prunekit.flops import count_modules, total
from prunekit.pruning.graph import trace
from prunekit.pruning.graph.groups import find_groups

EXAMPLE = torch.randn(2, 3, 16, 16)


def by_id(model, example=EXAMPLE):
    return {group.id: group for group in find_groups(model, example)}


def test_serial_gates_are_in_order():
    groups = by_id(Row())
    row = groups["conv1"]
    assert row.combine == {"serial": [0, 1]} and [g.norm for g in row.gates] == ["bn1", "bn2"]
    assert {(m.tensor, m.axis) for m in row.members if m.tensor.endswith(".weight")} == {
        ("conv1.weight", 0),
        ("bn1.weight", 0),
        ("depthwise.weight", 0),
        ("bn2.weight", 0),
        ("conv2.weight", 1),
    }
    assert groups["conv2"].combine == 0
    assert groups["out"].reason == "the model's output"
    assert groups["input"].reason == "the model's input"


def test_norms_of_a_sum_are_parallel():
    group = by_id(Residual())["stem"]
    assert group.producers == ["stem", "stem_bn", "conv", "bn"]
    # The convolution in the branch reads the stem alone, the next layer the sum.
    assert group.combine == {"parallel": [0, 1]} and {g.norm for g in group.gates} == {"stem_bn", "bn"}


def test_flatten_gives_channels_a_stride():
    group = by_id(Residual())["last"]
    (reader,) = group.readers
    assert (reader.tensor, reader.axis, reader.offset, reader.stride) == ("head.weight", 1, 0, 16)


def test_concatenation_gives_each_part_an_offset():
    groups = by_id(Concat())
    assert [tuple(g.slice) for g in groups["a"].gates + groups["b"].gates] == [(0, 5), (5, 8)]
    assert groups["b"].readers[0].offset == 5


def test_calls_of_one_module_share_their_channels():
    """What the second call reads is what the first one returns."""
    group = by_id(Shared())["stem"]
    axes = [(member.tensor, member.axis) for member in group.members if "weight" in member.tensor]
    assert axes == [("stem.weight", 0), ("bn.weight", 0), ("twice.weight", 0), ("twice.weight", 1), ("out.weight", 1)]
    # The second call reads and returns channels without a gate.
    assert group.reason is None and group.combine is None
    assert group.macs == 16 * 16 * (3 + 2 * (4 + 4) + 1)


def test_calls_of_one_module_on_different_channels_identify_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in "ab")
            self.head = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.PReLU(6))
            self.out = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.out(self.head(self.a(x))) + self.out(self.head(self.b(x)))

    groups = by_id(Twice())
    assert groups["a.0"].producers == ["a.0", "a.1", "b.0", "b.1"]
    assert groups["a.0"].combine == {"parallel": [0, 1]} and {gate.norm for gate in groups["a.0"].gates} == {
        "a.1",
        "b.1",
    }
    assert [(m.tensor, m.axis) for m in groups["a.0"].readers] == [("head.0.weight", 1)]
    assert [gate.norm for gate in groups["head.0"].gates] == ["head.1"] and "head.2.weight" in {
        member.tensor for member in groups["head.0"].members
    }


def test_unknown_operation_is_named_in_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.out(torch.fft.fft(self.bn(self.conv(x))).real)

    assert "not supported" in by_id(Odd())["conv"].reason


def test_parameter_outside_of_layers_follows():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return self.out(self.bn(self.conv(x)) * self.scale)

    group = by_id(Scaled())["conv"]
    assert group.reason is None and ("scale", 0) in {(m.tensor, m.axis) for m in group.members}


def test_group_without_a_norm_has_no_gate():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    group = by_id(model)["0"]
    assert (group.reason, group.combine, group.gates) == (None, None, [])


def test_csnet_groups():
    model = csnet(20)
    groups = find_groups(model, torch.randn(1, 3, 64, 64))
    cuttable = [g for g in groups if g.reason is None]
    blocks = [g for g in cuttable if g.id.startswith("stage")]
    # 15 blocks of two branches and three of one; three branches, fifteen dilations and one output in the head.
    assert len(blocks) == 33 and len(cuttable) == 33 + 3 + 15 + 1
    assert all(len(g.gates) == 3 and g.combine == {"serial": [0, 1, 2]} for g in blocks)
    side = next(g for g in groups if g.id == "stage2.3.mix.paths.0to0")
    assert {m.tensor for m in side.readers} == {
        f"{layer}.paths.0to{j}.weight" for layer, n in (("stage3.0.mix", 2), ("head.fuse.mix", 3)) for j in range(n)
    }


def test_costs_equal_what_removing_a_channel_saves():
    model = csnet(20)
    shape = (3, 32, 32)
    group = next(g for g in find_groups(model, torch.randn(1, *shape)) if g.id == "stage2.1.mix.paths.0to1")
    from prunekit.pruning.surgery.plan_builder import make_plan
    from prunekit.pruning.surgery.slim import apply_plan

    before = total(count_modules(model, shape)[0])
    plan = make_plan(model, find_groups(model, torch.randn(1, *shape)), {group.id: {3}})
    after = total(count_modules(apply_plan(model, plan, torch.randn(1, *shape)), shape)[0])
    assert before["params"] - after["params"] == group.params
    assert before["macs"] - after["macs"] == group.macs


def test_ids_are_the_same_in_every_process():
    code = (
        "import torch; from prunekit.backbones.csnet import csnet;"
        "from prunekit.pruning.graph.groups import find_groups;"
        "print([g.id for g in find_groups(csnet(10, blocks=(1, 2, 2, 1)), torch.randn(1, 3, 32, 32))])"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


def test_find_groups_leaves_the_model_unchanged():
    model = small_csnet().train()
    model.stage1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_groups(model, torch.randn(1, 3, 32, 32))
    assert model.training and not model.stage1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_frozen_model_has_the_same_groups():
    model = Row().requires_grad_(False)
    assert set(by_id(model)) == set(by_id(Row()))


def test_error_for_example_of_wrong_shape():
    with pytest.raises(PlanError, match=r"fails on an input of shape \(2, 5, 16, 16\)"):
        find_groups(Row(), torch.randn(2, 5, 16, 16))


class UpSampled(nn.Sequential):
    """Several kinds of up-sampling in sequence."""

    def __init__(self):
        ways = ({"mode": "bilinear"}, {"mode": "bicubic", "align_corners": True}, {"mode": "nearest"}, {"mode": "area"})
        blocks = [
            nn.Sequential(nn.Conv2d(c, c + 1, 1), nn.Upsample((c, 8), **way), nn.BatchNorm2d(c + 1), nn.PReLU(c + 1))
            for c, way in enumerate(ways, start=3)
        ]
        super().__init__(*blocks, nn.Conv2d(3 + len(ways), 1, 1))


@pytest.mark.parametrize("name", [*ZOO, "csnet", "up-sampled"])
def test_meta_device_gives_the_same_groups(name, monkeypatch):
    model = {**ZOO, "csnet": small_csnet, "up-sampled": UpSampled}[name]()
    example = init_norms(model)
    without = find_groups(model, example)

    def refuse(_):
        raise RuntimeError("wants to see numbers")

    monkeypatch.setattr(trace, "to_meta", refuse)
    assert find_groups(model, example) == without


def test_sum_and_product_of_a_tensor_with_itself():
    class Doubled(Row):
        def forward(self, x):
            x = self.bn1(self.conv1(x))
            return self.out(self.bn3(self.conv2(self.bn2(self.depthwise((x + x) * x)))))

    groups = by_id(Doubled())
    assert groups["conv1"].combine == {"serial": [0, 1]} and groups["conv1"].reason is None
    assert [group.id for group in groups.values()] == [group.id for group in by_id(Row()).values()]
