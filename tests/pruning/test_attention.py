"""Transformers: every kind of group of theirs is pruned and compared with a model that was written apart."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.left_out import leave_out
from helpers.marks import seeds
from helpers.zoo_attention import ATTENTION, DIVIDED, Language, OwnWidth, SharedWidth, Transformer
from helpers.zoo_products import PRODUCTS, example_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit.operations.keys import without_fast_path
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.silence import silence
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.pruning.surgery.masked_statistics import mask_statistics
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def cut_some(model, example, seed):
    """Silence and cut random channels; return the reference, the slim model and the dead channels."""
    groups, rng = find_groups(model, example), np.random.default_rng(seed)
    dead = {}
    for group in groups:
        if group.reason is None:
            count = min(int(rng.binomial(group.channels, 0.3)), group.channels - 1)
            dead[group.id] = set(rng.permutation(group.channels)[:count].tolist())
            silence(model, group, np.array(sorted(dead[group.id]), int))
    small, report = slim(model, make_plan(model, groups, dead), example, groups=groups, exact=True)
    assert report.passed and report.given_back == 0
    return leave_out(model, groups, dead), small, groups, dead


@pytest.mark.parametrize("seed", seeds(20, plain=2))
@pytest.mark.parametrize("name", ATTENTION)
def test_cut_transformer_is_equivalent_on_other_images(name, seed):
    torch.manual_seed(seed)
    reference, small, *_ = cut_some(ATTENTION[name]().eval(), IMAGES, seed)
    other = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(small.double()(other), reference.double()(other), rtol=1e-6, atol=1e-7)


def test_everything_of_a_transformer_can_be_pruned():
    for name in ("shared_width", "own_width"):
        locked = [group for group in find_groups(ATTENTION[name]().eval(), IMAGES) if group.reason]
        # The three of qkv in each block, the classes, the positions, and the input.
        assert [g.channels for g in locked] == ([3, 3] if name == "shared_width" else []) + [10, 17, 3]


def test_width_of_heads_follows_the_width_of_the_input():
    """Code such as C // heads: the input loses as many channels as all heads together."""
    model = Transformer(lambda dim: SharedWidth(dim, 4)).eval()
    heads, group = [g for g in find_groups(model, IMAGES) if g.id.startswith("patches")]
    assert {(a.module, a.name) for a in heads.attributes} == {(f"blocks.{i}.attention", "heads") for i in (0, 1)}
    assert group.channels == 4 and group.members[0].times == 4
    axes = {(m.tensor, m.axis) for m in group.members}
    assert {("token", 2), ("positions", 2), ("blocks.0.scale", 0), ("blocks.1.attention.qkv.weight", 0)} <= axes
    small, _ = slim(model, make_plan(model, [group], {group.id: {1}}), IMAGES, groups=find_groups(model, IMAGES))
    assert small.patches.out_channels == 12 and small.norm.normalized_shape == (12,)
    assert small.blocks[0].attention.qkv.out_features == 36


@pytest.mark.parametrize("name", DIVIDED)
def test_width_of_all_heads_is_that_of_the_input(name):
    model = ATTENTION[name]().eval()
    groups = find_groups(model, IMAGES)
    # Queries, keys and values, the classes, the positions, and the input.
    assert {group.channels for group in groups if group.reason} <= {2, 3, 10, 17}
    heads, channels = [g for g in groups if g.id.startswith("patches")]
    assert (heads.channels, channels.channels) == (2, 8) and heads.reason is channels.reason is None
    small, report = prunekit.Pruner(
        model, IMAGES, importance="magnitude", pruning_ratio=0.3, global_pruning=False
    ).step()
    assert report.equivalence.passed and small.patches.out_channels == small.blocks[0].attention.proj.in_features == 12


def test_heads_of_keys_are_pruned_with_their_queries():
    model, example = PRODUCTS["grouped_queries"]().eval(), example_of("grouped_queries")
    groups = find_groups(model, example)
    (heads,) = [g for g in groups if {m.tensor: m.times for m in g.members}.get("q.weight") == 12]
    assert heads.channels == 2 and heads.reason is None
    small, report = slim(model, make_plan(model, groups, {heads.id: {0}}), example, groups=groups)
    assert report.passed and (small.q.out_features, small.k.out_features, small.v.out_features) == (12, 4, 4)
    assert torch.equal(small.q.weight, model.q.weight[12:]) and torch.equal(small.v.weight, model.v.weight[4:])


@pytest.mark.parametrize("size", [6, 16, 24])
def test_attribute_of_queries_keys_and_values_ties_them(size):
    model = Transformer(lambda dim: OwnWidth(dim, 4, size)).eval()
    tied = [g for g in find_groups(model, IMAGES) if any(a.name == "head_dim" for a in g.attributes)]
    assert [g.channels for g in tied] == [size, size] and all(g.reason is None for g in tied)
    for index, group in enumerate(tied):
        own = {m.tensor for m in group.members if m.tensor.endswith(".weight")}
        assert own == {f"blocks.{index}.attention.{layer}.weight" for layer in ("q", "k", "v", "out")}
    small, _ = slim(model, make_plan(model, tied, {tied[0].id: {0, 3}}), IMAGES, groups=find_groups(model, IMAGES))
    assert small.blocks[0].attention.head_dim == size - 2 and small.blocks[1].attention.head_dim == size


class SoftmaxOfFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        y = self.first(x)
        weights = (y.unsqueeze(2) * y.unsqueeze(1)).softmax(-1)  # of each feature with each other one
        return self.last((weights @ y.unsqueeze(2)).squeeze(2))


def test_softmax_over_channels_is_over_those_that_are_left():
    torch.manual_seed(0)
    model, x = SoftmaxOfFeatures().eval().double(), torch.randn(6, 8, dtype=torch.float64)
    groups = find_groups(model, x)
    (group,) = [group for group in groups if group.reason is None]
    small, report = slim(model, make_plan(model, groups, {group.id: {1, 5}}), x, groups=groups)
    kept = torch.ones(12, dtype=torch.bool)
    kept[[1, 5]] = False
    with torch.no_grad():
        y = model.first(x)
        scores = (y.unsqueeze(2) * y.unsqueeze(1)).masked_fill(~kept, -torch.inf)
        mixed = (scores.softmax(-1) @ y.unsqueeze(2)).squeeze(2) * kept
        expected = F.linear(mixed, model.last.weight, model.last.bias)
        torch.testing.assert_close(small(x), expected)
        torch.testing.assert_close(mask_statistics(model, groups, {group.id: {1, 5}})(x), expected)
    assert report.passed and small.first.out_features == 10


def test_language_model_of_tokens():
    torch.manual_seed(0)
    model, tokens = Language().eval(), torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(0))
    pruner = prunekit.Pruner(model, tokens, importance="magnitude", pruning_ratio=0.4, global_pruning=False)
    small, report = pruner.step()
    assert report.equivalence.passed and report.after.params < 0.5 * report.before.params
    assert small.head.weight is small.embedding.weight and small.embedding.embedding_dim == small.head.in_features == 10
    assert small(torch.randint(40, (2, 9))).shape == (2, 9, 40)
    _, report = prunekit.Pruner(model, tokens, importance="magnitude", target={"params_ratio": 0.5}).step()
    assert abs(report.after.params / report.before.params - 0.5) < 0.02


@pytest.mark.parametrize("name", ["shared_width", "own_width"])
def test_pruning_in_two_steps(name):
    torch.manual_seed(0)
    pruner = prunekit.Pruner(
        ATTENTION[name]().eval(), IMAGES, importance="magnitude", pruning_ratio=0.5, global_pruning=False, steps=2
    )
    for _ in range(2):
        small, report = pruner.step()
        assert report.equivalence.passed
    assert report.after.params < 0.5 * sum(p.numel() for p in ATTENTION[name]().parameters())
    assert small(IMAGES).shape == (4, 10)


class ScaledBySize(nn.Module):
    """Divides by the root of an attribute, in code that also depends on values."""

    def __init__(self):
        super().__init__()
        self.size = 9
        self.q, self.k, self.head = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(4, 3)

    def forward(self, x):
        if x.abs().max() < 1e9:
            x = x + 1
        q, k = (layer(x).view(len(x), 4, self.size) for layer in (self.q, self.k))
        return self.head((q @ k.transpose(1, 2) / math.sqrt(self.size)).softmax(-1)).mean(1)


def test_size_in_the_scale_of_a_model_that_reads_values():
    torch.manual_seed(0)
    groups = find_groups(ScaledBySize().eval(), torch.randn(3, 4, 8))
    group = next(g for g in groups if g.channels == 9)
    assert group.reason and ("computes with the number of channels" in group.reason or "fails" in group.reason)


class ReadsShape(nn.Module):
    """Takes one channel, of which only the shape matters."""

    def __init__(self):
        super().__init__()
        self.first, self.positions, self.last = nn.Linear(8, 16), nn.Embedding(10, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        length = x[:, :, -1].flip(0).shape[1]
        return self.last(F.relu(x + self.positions(torch.arange(length, device=x.device))))


def test_operations_on_which_no_output_depends_forbid_nothing():
    torch.manual_seed(0)
    small, report = prunekit.Pruner(
        ReadsShape().eval(), torch.randn(3, 5, 8), importance="magnitude", pruning_ratio=0.5
    ).step()
    assert report.equivalence.passed and small.first.out_features == small.positions.embedding_dim == 8


@pytest.mark.parametrize("name", ["shared_width", "own_width", "vit"])
def test_target_counts_the_products_of_attention(name):
    torch.manual_seed(0)
    model = PRODUCTS[name]().eval()
    small, report = prunekit.Pruner(model, IMAGES, importance="magnitude", target={"macs_ratio": 0.5}).step()
    assert abs(report.after.macs / report.before.macs / 0.5 - 1) <= 0.02
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with without_fast_path(), torch.no_grad(), kernel, FlopCounterMode(display=False) as mode:
        small(IMAGES[:1])
    assert mode.get_total_flops() == 2 * report.after.macs


@pytest.mark.parametrize("name", ["own_width", "vit", "einsum", "baddbmm", "position_table"])
def test_cost_of_a_channel_includes_products(name):
    """Of channels that no product has twice, it is what removing one saves."""
    model, example = PRODUCTS[name]().eval(), example_of(name)
    groups = find_groups(model, example)
    sizes, checked = SizeModel(model, groups, example), 0
    for group in (group for group in groups if group.reason is None):
        places = [(p.module, p.operation, p.call, p.part) for p in group.products]
        if len(set(places)) == len(places):
            assert group.macs == sizes.dense.macs - sizes.size_without({group.id: 1}).macs
            checked += any("linear" not in operation for _, operation, *_ in places) or name == "position_table"
    assert checked


class Standardized(nn.Conv2d):
    """A convolution with standardized weights (Qiao et al., 2019), as BiT and NFNets have it."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, eps=1e-6)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, padding=1)


@pytest.mark.parametrize("seed", seeds(10, plain=2))
def test_standardized_weights_leave_pruned_inputs_out(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        Standardized(3, 12, 3), nn.ReLU(), Standardized(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)
    ).eval()
    _, small, _, dead = cut_some(model, IMAGES, seed)
    kept = [k for k in range(12) if k not in dead["0"]]
    assert small[2].in_channels == len(kept) < 12
    torch.testing.assert_close(small[2].weight, model[2].weight[:, kept][[k for k in range(8) if k not in dead["2"]]])
