import pytest
import torch

from prunekit.layers import FusionHead, InLayerBlock, layer_of
from prunekit.layers.blocks import STEP_SCALE, DilatedConvs


def test_in_layer_block_uses_one_split_for_its_three_units():
    block = InLayerBlock([6], [4, 3], 3, stride=2)
    ys = block([torch.randn(2, 6, 9, 10)])
    assert [tuple(y.shape) for y in ys] == [(2, 4, 5, 5), (2, 3, 3, 3)]
    assert [m.num_features for m in block.depthwise2_out.norms.values()] == [4, 3]


def test_absent_branch_has_no_modules():
    block = InLayerBlock([6, 0], [0, 5])
    assert not any(name.endswith((".0", "0to0", "1to1")) for name, _ in block.named_modules())
    ys = block([torch.randn(2, 6, 8, 8), None], (8, 8))
    assert ys[0] is None and ys[1].shape == (2, 5, 4, 4)


@pytest.mark.parametrize("channels, widths", [(13, [2, 2, 2, 2, 5]), (53, [10, 10, 10, 10, 13]), (3, [3])])
def test_dilations_divide_the_channels_of_a_branch(channels, widths):
    layer = DilatedConvs([channels], (1, 2, 4, 8, 16))
    assert [conv.out_channels for conv in layer.branches["0"].values()] == widths
    assert layer([torch.randn(1, channels, 6, 6)])[0].shape == (1, channels, 6, 6)


def test_scaled_convolutions_store_weights_times_100():
    torch.manual_seed(0)
    weight = InLayerBlock([3], [64, 64]).depthwise1["0"].weight
    # A depthwise 3×3 has a fan-in of 9.
    assert 0.9 * STEP_SCALE / 3 < weight.abs().max() <= STEP_SCALE / 3


def test_head_fuses_stages_at_the_finest_resolution():
    head = FusionHead([12, 24, 24]).eval()
    xs = [torch.randn(1, n, s, s) for n, s in ((12, 9), (24, 5), (24, 3))]
    assert head(xs, (9, 9)).shape == (1, head.out_channels, 9, 9)
    assert head.out_channels == 4 + 8 + 8


def test_layer_of_returns_layer_and_branch():
    head = torch.nn.ModuleDict({"head": FusionHead([12, 24, 24])})
    assert layer_of(head, "head.fuse.mix.paths.2to1") == ("head.fuse", 1)
    assert layer_of(head, "head.dilated.branches.2.16") == ("head.dilated", 2)
    assert layer_of(head, "head.merge.mix_out.norms.0") == ("head.merge", 0)
    assert layer_of(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), "0") == ("0", None)
