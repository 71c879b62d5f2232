import copy
import re

import numpy as np
import pytest
import torch
from helpers.marks import seeds, slow
from helpers.networks import Concat, Residual, Row, csnet_with_dead_gates, init_norms, params, small_csnet, zero_gates
from helpers.zoo import ZOO, mobilenet_v3

import prunekit
from prunekit.errors import PlanError
from prunekit.pruning.graph import slicing
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection import importance
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery import constant_folding, rebuild
from prunekit.pruning.surgery.equivalence import check_equivalence, check_inputs, zero_dead_gates
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import apply_plan, slim


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", seeds(6))
def test_csnet_with_random_dead_gates(seed, exact):
    model, groups, example = csnet_with_dead_gates(seed, share=0.2 + 0.1 * seed, whole=0.3 * (seed % 2))
    plan = extract(model, groups)
    small, equivalence = slim(model, plan, example, groups=groups, exact=exact)
    assert equivalence.passed and equivalence.max_abs_diff <= equivalence.tolerance
    assert equivalence.float32_diff < 1e-4
    sizes = [tuple(shape[2:]) for shape in equivalence.inputs]
    assert len(set(sizes)) == len(sizes) > 1
    assert params(small) < params(model)
    assert equivalence.given_back == 0 and equivalence.max_abs_diff < 1e-12
    assert exact or (equivalence.carriers == 0 and equivalence.plan.groups == plan.groups)
    # The plan is enough to build the slim model again.
    again = apply_plan(small_csnet(), prunekit.Plan.from_json(equivalence.plan.to_json()), example)
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(example), small.eval()(example))


@pytest.mark.parametrize("network", [Row, Residual, Concat, lambda: Row(padding=1)])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_other_networks(network, exact, seed):
    torch.manual_seed(seed)
    model = network()
    example = init_norms(model, seed)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.5, seed)
    plan = extract(model, groups)
    small, equivalence = slim(model, plan, example, exact=exact)
    assert equivalence.passed and equivalence.max_abs_diff < 1e-12
    assert equivalence.plan.groups == plan.groups if not exact else params(small) < params(model)


def test_constant_is_folded_into_the_next_norm():
    model = Row()
    example = init_norms(model)
    with torch.no_grad():
        model.bn1.weight[2] = model.bn2.weight[2] = 0
        model.bn2.bias[2] = 5.0
    groups = find_groups(model, example)
    small, equivalence = slim(model, extract(model, groups), example)
    assert small.conv1.out_channels == small.depthwise.groups == small.conv2.in_channels == 7
    assert equivalence.folded == 1 and equivalence.carriers == 0 and equivalence.max_abs_diff < 1e-12
    constant = torch.nn.functional.silu(torch.tensor(5.0))
    moved = model.conv2.weight[:, 2].sum((1, 2)) * constant
    torch.testing.assert_close(model.bn3.running_mean - small.bn3.running_mean, moved, rtol=1e-4, atol=1e-5)
    assert equivalence.plan.added_bias == []


def test_constant_becomes_a_bias_without_next_norm():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4)
            self.out = torch.nn.Conv2d(4, 2, 1, bias=False)

        def forward(self, x):
            return self.out(self.bn(self.conv(x)))

    model = Plain()
    example = init_norms(model)
    with torch.no_grad():
        model.bn.weight[1] = 0
        model.bn.bias[1] = 3.0
    small, equivalence = slim(model, extract(model, find_groups(model, example)), example)
    assert equivalence.plan.added_bias == ["out"] and equivalence.max_abs_diff < 1e-12
    torch.testing.assert_close(small.out.bias, model.out.weight[:, 1, 0, 0] * 3.0)
    again = apply_plan(Plain(), equivalence.plan, example)
    again.load_state_dict(small.state_dict())


def padded_with_constants():
    """A reader that pads with zeros, and three dead channels with different constants."""
    model = Row(padding=1)
    example = init_norms(model)
    with torch.no_grad():
        for channel, beta in ((1, 2.0), (4, 3.0), (6, 0.0)):
            model.bn1.weight[channel] = model.bn2.weight[channel] = 0
            model.bn2.bias[channel] = beta
    return model, example, find_groups(model, example)


def test_padded_reader_gets_one_carrier():
    model, example, groups = padded_with_constants()
    small, equivalence = slim(model, extract(model, groups), example, exact=True)
    assert equivalence.carriers == 1 and equivalence.plan.carriers == {"conv1": [4]}
    assert equivalence.given_back == 0 and equivalence.max_abs_diff < 1e-12
    assert small.conv1.out_channels == 6


def test_dead_branch_is_removed_with_its_paths_norm_and_activation():
    model = small_csnet()
    example = init_norms(model)
    groups = find_groups(model, example)
    group = next(g for g in groups if g.id == "stage1.1.mix.paths.0to0")
    small, equivalence = slim(model, make_plan(model, groups, {group.id: set(range(5))}), example, groups=groups)
    block, after = small.stage1[1], small.stage1[2]
    assert set(block.mix.paths) == {"0to1", "1to1"} and set(after.mix.paths) == {"1to0", "1to1"}
    for part in (block.mix_out, block.depthwise1_out, block.depthwise2_out):
        assert set(part.norms) == set(part.acts) == {"1"}
    assert set(block.depthwise1) == set(block.depthwise2) == {"1"}
    assert equivalence.passed and equivalence.plan.splits["stage1.1"] == [0, 5]


def test_dense_model_is_unchanged_and_modes_are_kept():
    model, groups, example = csnet_with_dead_gates(0)
    model.train()
    model.head.eval()
    model.classifier.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.training and not small.head.training and model.training and not model.head.training
    assert not small.classifier.weight.requires_grad and small.stage1[0].mix_out.acts["0"].weight.requires_grad
    assert next(small.parameters()).dtype == torch.float32


@pytest.fixture(scope="module")
def prepared_pair():
    model, groups, example = csnet_with_dead_gates(3)
    small, _ = slim(model, extract(model, groups), example, groups=groups, exact=True)
    gated = zero_dead_gates(model.double(), groups, {})
    return gated, small.double().eval(), check_inputs(gated, example)


@pytest.fixture
def gated_pair(prepared_pair):
    """A CSNet with dead gates, its slim model, and inputs to compare them on."""
    return copy.deepcopy(prepared_pair)


def test_check_fails_for_a_wrong_slim_model(gated_pair):
    gated, small, inputs = gated_pair
    assert check_equivalence(gated, small, inputs).passed
    with torch.no_grad():
        small.stage2[1].mix.paths["0to0"].weight[0, 0] += 1e-3
    equivalence = check_equivalence(gated, small, inputs)
    assert not equivalence.passed and "differ by" in equivalence.reason


def test_check_fails_for_nan_and_for_a_dead_network(gated_pair):
    gated, small, inputs = gated_pair
    for model in (gated, small):
        model.classifier.weight.data.zero_()
        model.classifier.bias.data.zero_()
    dead = check_equivalence(gated, small, inputs)
    assert dead.max_abs_diff == 0 and not dead.passed and "same for every input" in dead.reason
    for model in (gated, small):
        model.classifier.weight.data.fill_(float("nan"))
    assert check_equivalence(gated, small, inputs).reason == "an output is not finite"


@pytest.mark.parametrize("share", [1e-15, 1e-7, 1e-5])
def test_check_fails_if_the_output_hardly_varies(gated_pair, share):
    gated, small, inputs = gated_pair
    last = torch.nn.Conv2d(1, 1, 1).double().requires_grad_(False)
    spread = max(float((maps - maps[:1]).detach().abs().max()) for maps in map(gated, inputs))
    last.weight.fill_(share / spread)
    last.bias.fill_(1)
    equivalence = check_equivalence(torch.nn.Sequential(gated, last), torch.nn.Sequential(small, last), inputs)
    assert equivalence.max_abs_diff <= equivalence.tolerance
    assert equivalence.passed is (share > 1e-6) and (equivalence.passed or "same for every input" in equivalence.reason)


def test_dead_network_error_suggests_a_fix():
    model = Concat()
    example = init_norms(model)
    model.bn.weight.data[[0, 5]] = 0
    groups = find_groups(model, example)
    # What is left emits constants.
    plan = make_plan(model, groups, {"a": {1, 2, 3, 4}, "b": {1, 2}})
    with pytest.raises(PlanError, match=r"the network is dead; prune fewer channels, or train with a lower rate"):
        slim(model, plan, example, groups=groups)
    model.out.weight.data.mul_(1e-12)
    with pytest.raises(PlanError, match=r"the network is dead, already before pruning; train it first, or pass real"):
        slim(model, plan, example, groups=groups)


def test_failed_check_raises_plan_error(monkeypatch):
    # Without folding, the slim model lacks the responses of the dead channels.
    monkeypatch.setattr(rebuild, "apply_folding", lambda *_: {})
    model, groups, example = csnet_with_dead_gates(2)
    with pytest.raises(PlanError, match="is not equivalent to the dense model"):
        slim(model, extract(model, groups), example, groups=groups)


@pytest.mark.parametrize("network", [Row, Residual, Concat, ZOO["mobilenet_v3"], ZOO["unet_transposed"]])
@pytest.mark.parametrize("wrong", ["channel", "shift"])
def test_a_wrong_surgery_is_detected(monkeypatch, network, wrong):
    """Another channel is cut than its readers lose, or a reader gets a wrong shift."""
    slice_module, output_shift = slicing._slice_module, constant_folding._output_shift

    def cut_another(module, masks, owners):
        masks = {name: {axis: np.roll(m, axis == 0) for axis, m in axes.items()} for name, axes in masks.items()}
        slice_module(module, masks, owners)

    if wrong == "channel":
        monkeypatch.setattr(slicing, "_slice_module", cut_another)
    else:
        monkeypatch.setattr(constant_folding, "_output_shift", lambda *args: 1.001 * output_shift(*args) + 1e-4)
    torch.manual_seed(0)
    model = network()
    example = init_norms(model)
    groups = find_groups(model, example)
    plan = extract(model, groups, scores=importance.random(model, groups), pruning_ratio=0.3)
    with pytest.raises(PlanError, match=r"with the same inputs replaced by their means: the outputs differ by"):
        slim(model, plan, example, groups=groups)


def test_apply_plan_rejects_plan_of_another_model():
    model, groups, example = csnet_with_dead_gates(2)
    plan = extract(model, groups)
    with pytest.raises(PlanError, match="made for another model"):
        apply_plan(Row(), plan, example)
    plan.groups["classifier"] = []
    with pytest.raises(PlanError, match="cannot be pruned: the model's output"):
        apply_plan(small_csnet(), plan, example)
    plan = extract(model, groups)
    plan.groups["stage1.0.mix.paths.0to0"] = [0, 99]
    with pytest.raises(PlanError, match="does not have"):
        apply_plan(small_csnet(), plan, example)
    plan = extract(model, groups)
    plan.removed = [*plan.removed, "stage1.0"]
    with pytest.raises(PlanError, match=r"disagree about stage1\.0"):
        apply_plan(small_csnet(), plan, example)


@pytest.mark.parametrize("network", [Residual, slow(small_csnet)])
def test_slim_a_slim_model(network):
    model = network()
    example = init_norms(model)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.3)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    groups = find_groups(small, example)
    zero_gates(small, groups, 0.5, seed=9)
    smaller, equivalence = slim(small, extract(small, groups), example, groups=groups)
    assert equivalence.passed and params(smaller) < params(small)


def test_public_api():
    model, _, example = csnet_with_dead_gates(2)
    groups = prunekit.find_groups(model, example)
    plan = prunekit.extract(model, groups, threshold=1e-3)
    small, equivalence = prunekit.slim(model, plan, example)
    assert equivalence.passed and equivalence.plan is not None and params(small) < params(model)


def test_channels_are_given_back_until_nothing_else_moves():
    torch.manual_seed(0)
    model = ZOO["resnet_se"]()
    example = init_norms(model)
    groups = find_groups(model, example)
    scores = importance.random(model, groups)
    # Channels given back change the squeeze, and so make others vary that were constant.
    plan = extract(model, groups, scores=scores, pruning_ratio=0.5)
    small, report = slim(model, plan, example, groups=groups, exact=True)
    assert report.passed and report.given_back > 0 and params(small) < params(model)
    assert f"{report.given_back} dead channels stay" in " ".join(report.plan.notes)


def test_a_slim_model_with_channels_given_back_is_saved_and_rebuilt(tmp_path):
    torch.manual_seed(0)
    model = mobilenet_v3()
    example = init_norms(model)
    groups = find_groups(model, example)
    plan = extract(model, groups, scores=importance.random(model, groups), pruning_ratio=0.4)
    small, report = slim(model, plan, example, groups=groups, exact=True)
    assert report.given_back and report.plan.groups != plan.groups
    prunekit.save(small, tmp_path / "slim", builder=mobilenet_v3)
    assert torch.equal(prunekit.load(tmp_path / "slim", builder=mobilenet_v3)(example), small(example))
    apply_plan(mobilenet_v3(), report.plan, example).load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        apply_plan(mobilenet_v3(), plan, example).load_state_dict(small.state_dict())


class Grouped(torch.nn.Module):
    def __init__(self, padding):
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)
        self.grouped = torch.nn.Conv2d(16, 16, 3, padding=padding, groups=2, bias=False)
        self.norm2, self.out = torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.out(self.norm2(self.grouped(x)).relu())


def slim_grouped(padding, dead, silent=()):
    torch.manual_seed(0)
    model = Grouped(padding)
    example = init_norms(model, size=16)
    with torch.no_grad():
        model.norm.bias.fill_(0.2)
        model.norm.bias[list(silent)] = -0.2
    groups = find_groups(model, example)
    return slim(model, make_plan(model, groups, {"first": dead}), example, groups=groups, exact=True)


@pytest.mark.parametrize(
    ("padding", "dead", "silent", "left", "note"),
    [
        (1, [0, 8], [], 16, r"nothing is cut of first: what is dead there \(2\) carries constants"),
        (1, [0, 1, 8, 9], [8, 9], 14, r"1 dead channel kept with weights of zero, so that the groups of a convolution"),
        (1, [0, 8], [0, 8], 14, None),
        (0, [0, 8], [], 14, None),
    ],
)
def test_channels_that_a_grouped_convolution_keeps_are_reported(padding, dead, silent, left, note):
    small, report = slim_grouped(padding, dead, silent)
    assert report.passed and small.first.out_channels == left
    unread = int((small.grouped.weight.abs().amax((0, 2, 3)) == 0).sum())
    rows = small.grouped.weight.abs().amax((2, 3)).unflatten(0, (2, -1)).amax(1)
    assert unread <= report.unread == int((rows == 0).sum())
    assert any(re.search(note, text) for text in report.plan.notes) if note else len(report.plan.notes) <= 1


@pytest.mark.parametrize("kind", ["conv2d", "conv3d", "grouped"])
def test_memory_format_is_kept(kind):
    torch.manual_seed(0)
    if kind == "conv3d":
        model = torch.nn.Sequential(
            *(torch.nn.Conv3d(3, 8, 3, bias=False), torch.nn.BatchNorm3d(8), torch.nn.ReLU(), torch.nn.Conv3d(8, 2, 3))
        ).eval()
        example, layout = torch.randn(2, 3, 8, 8, 8), torch.channels_last_3d
    else:
        model = Grouped(1) if kind == "grouped" else Row(1)
        example, layout = init_norms(model, size=16), torch.channels_last
    model = model.to(memory_format=layout)
    groups = find_groups(model, example)
    plan = extract(model, groups, scores=importance.random(model, groups), pruning_ratio=0.4)
    small, _ = slim(model, plan, example, groups=groups)
    dense = dict(model.named_parameters())
    for name, weight in small.named_parameters():
        if weight.dim() > 2:
            assert weight.is_contiguous(memory_format=layout), name
            assert weight.is_contiguous() == dense[name].is_contiguous(), name
    assert params(small) < params(model)
