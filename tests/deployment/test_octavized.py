"""Octavized networks, dense and slim, work with FLOP counters and ONNX export."""

import pytest
import torch
from helpers.networks import init_norms, params, zero_gates
from helpers.octave_networks import Residual

from prunekit.backbones.octresnet import octresnet
from prunekit.deployment.export.onnx import check_onnx, export_onnx
from prunekit.flops import counters, layers_table
from prunekit.layers.octavize import octavize
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def test_counters_agree_on_dense_and_slim():
    model = octresnet(8, 8)
    example = init_norms(model, 0, 20)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.5, whole=0.5)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    for one in (model, small):
        found = counters(one, (3, 17, 22))
        assert (
            found["prunekit"]["macs"] == found["fvcore"]["macs"] == found["thop"]["macs"] == found["torch"]["macs"] > 0
        )
        assert found["prunekit"]["params"] == found["fvcore"]["params"] == found["thop"]["params"] == params(one)
    rows = layers_table(model, small, (3, 17, 22))["layers"]
    channels = {(row["layer"], row["branch"]): row["channels"]["before"] for row in rows}
    assert channels == {
        **{(layer, b): n for layer, split in make_plan(model, groups, {}).splits.items() for b, n in enumerate(split)},
        ("classifier", 0): 10,
    }


def test_onnx_export():
    torch.manual_seed(1)
    model = octavize(Residual(), torch.zeros(2, 3, 20, 20))
    example = init_norms(model, 0, 20)
    groups = find_groups(model, example)
    zero_gates(model, groups, 0.4, whole=0.5)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    others = [torch.randn(3, 3, 21, 14), torch.randn(1, 3, 7, 7)]
    assert check_onnx(export_onnx(small, example), small, [example, *others]) < 1e-4
