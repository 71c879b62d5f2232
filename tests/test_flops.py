import pytest
import torch
from helpers.networks import Row, csnet_with_dead_gates, small_csnet
from helpers.zoo_attention import SharedWidth, Transformer
from torch import nn

from prunekit.backbones.csnet import csnet
from prunekit.flops import Count, count_modules, counters, layers_table, total
from prunekit.pruning.selection.extract import extract
from prunekit.pruning.surgery.slim import slim

SIZE = (3, 224, 224)


def test_independent_counters_agree():
    found = counters(csnet(20), SIZE)
    assert (
        found["prunekit"]["macs"]
        == found["fvcore"]["macs"]
        == found["thop"]["macs"]
        == found["torch"]["macs"]
        == 432_819_744
    )
    assert found["prunekit"]["params"] == found["fvcore"]["params"] == found["thop"]["params"] == 210_985
    for other in ("fvcore", "thop"):
        for name, macs in found["prunekit"]["modules"].items():
            assert found[other]["modules"].get(name, 0) == macs, (other, name)


def test_paper_flops_by_layer_kind_match_published_counter():
    """The parts that the published counter gives for the dense ×1."""
    model = csnet(20)
    counts, _ = count_modules(model, SIZE)
    modules = dict(model.named_modules())

    def part(kind, where=lambda name: True):
        return sum(c.paper_flops for name, c in counts.items() if isinstance(modules[name], kind) and where(name))

    assert part(nn.BatchNorm2d) == 67_380_096
    assert part(nn.PReLU) == 50_535_072
    assert part(nn.Conv2d, lambda name: ".depthwise" in name) == 92_998_080
    assert part(nn.Conv2d, lambda name: ".dilated." in name) == 42_928_704
    assert counts["classifier"].paper_flops == 815_360 + 12_544
    multi = 296_077_600 + 1_906_688 + 6_899_200 + 51_085_440
    assert part(nn.Conv2d, lambda name: ".paths." in name) == multi


def test_paper_flops_are_none_for_unsupported_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    found = total(count_modules(model, (3, 8, 8))[0])
    assert found == {"params": 16, "macs": 3 * 4 * 64, "paper_flops": None}


def test_count_modules_reports_unknown_modules():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.scale, self.pair = nn.LayerNorm([8, 8]), nn.Bilinear(8, 8, 5)

        def forward(self, x):
            x = self.scale(self.conv(x))
            return self.pair(x, x)

    counts, unknown = count_modules(Odd(), (3, 8, 8))
    assert unknown == ["pair"] and counts["scale"].params == 128 and counts["scale"].macs == 0


def test_products_of_activations_have_a_row_of_their_module():
    model = Transformer(lambda dim: SharedWidth(dim, 4), depth=1)
    counts, unknown = count_modules(model, (3, 32, 32))
    assert counts["blocks.0.attention"] == Count(0, 2 * 17 * 17 * 16, None) and unknown == []
    assert [name for name in counts if name.startswith("blocks.0.a")] == [
        f"blocks.0.attention{layer}" for layer in ("", ".qkv", ".proj")
    ]
    rows = layers_table(model, None, (3, 32, 32))["layers"]
    assert sum(row["macs"]["before"] for row in rows) == total(counts)["macs"]


def test_parameters_of_container_modules_are_counted():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1, 1))
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) * self.scale

    model = nn.Sequential(Scaled())
    counts, unknown = count_modules(model, (3, 8, 8))
    assert total(counts)["params"] == 20 and unknown == []
    assert sum(row["params"]["before"] for row in layers_table(model, None, (3, 8, 8))["layers"]) == 20
    assert total(count_modules(Scaled(), (3, 8, 8))[0])["params"] == 20
    assert sum(row["params"]["before"] for row in layers_table(Scaled(), None, (3, 8, 8))["layers"]) == 20


def test_macs_match_hand_computed_values():
    model = Row()
    counts, _ = count_modules(model, (3, 10, 10))
    assert counts["conv1"].macs == 100 * 8 * 3 * 9
    assert counts["depthwise"].macs == 100 * 8 * 9
    assert counts["conv2"].macs == 64 * 6 * 8 * 9
    assert counts["bn1"].macs == 0


def test_counting_does_not_change_the_model():
    model = small_csnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counters(model, (3, 32, 32))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_layer_rows_sum_to_model_totals_before_and_after_slimming():
    model, groups, example = csnet_with_dead_gates(1)
    small, _ = slim(model, extract(model, groups), example, groups=groups)
    rows = layers_table(model, small, (3, 32, 32))["layers"]
    for when, one in (("before", model), ("after", small)):
        sums = total(count_modules(one, (3, 32, 32))[0])
        for key, value in sums.items():
            assert sum(row[key][when] for row in rows) == value
        assert sum(row["fvcore_macs"][when] for row in rows) == sums["macs"]
    assert len({(row["layer"], row["branch"]) for row in rows}) == len(rows)
    block = next(row for row in rows if row["layer"] == "stage3.0" and row["branch"] == 1)
    assert block["channels"]["before"] == 20


@pytest.mark.parametrize("width", [20])
def test_layer_rows_has_one_row_per_layer_and_branch(width):
    rows = layers_table(csnet(width), None, (3, 32, 32))["layers"]
    assert [(r["layer"], r["branch"]) for r in rows[:3]] == [("stage0.0", 0), ("stage0.0", 1), ("stage1.0", 0)]
    assert rows[0]["channels"] == {"before": 10, "after": None}
    assert rows[-1]["layer"] == "classifier"
