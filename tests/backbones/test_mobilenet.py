import pytest
import torch

from prunekit.backbones import build
from prunekit.backbones.mobilenet import mobilenet
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, total
from prunekit.pruning.graph.groups import find_groups


def test_macs_by_hand():
    def block(inputs, outputs, expansion, before, after):
        hidden, squeezed = inputs * expansion, inputs // 4
        expand = inputs * hidden * before if expansion > 1 else 0
        return expand + hidden * 9 * after + 2 * hidden * squeezed + hidden * outputs * after

    big, middle = 32 * 32, 16 * 16
    by_hand = 3 * 16 * 9 * big + block(16, 16, 1, big, big)
    by_hand += block(16, 24, 4, big, middle) + 24 * 48 * middle + 48 * 10
    assert total(count_modules(mobilenet((16, 24), 1, 4, 48), (3, 32, 32))[0])["macs"] == by_hand


@pytest.mark.parametrize("size", [(8, 8), (33, 47), (1, 1)])
def test_any_image_size(size):
    assert mobilenet((4, 8), 1, 2, 8, 7).eval()(torch.randn(2, 3, *size)).shape == (2, 7)


def test_shortcuts_where_the_shape_stays():
    blocks = mobilenet((8, 8, 16), 2).blocks
    assert [block.has_shortcut for block in blocks] == [True, True, False, True, False, True]


def test_squeeze_and_excitation_scales_each_channel():
    torch.manual_seed(0)
    excite, x = mobilenet((8,), 1).blocks[0].excite, torch.rand(1, 8, 4, 4) + 1
    scale = excite(x) / x
    assert (scale > 0).all() and (scale < 1).all()
    assert torch.allclose(scale, scale.mean((2, 3), keepdim=True).expand_as(scale))
    assert scale.mean((0, 2, 3)).std() > 1e-3


def test_all_channels_after_the_input_can_be_pruned():
    groups = find_groups(mobilenet((8, 12), 2, 3, 20), torch.randn(2, 3, 16, 16))
    free = [group for group in groups if group.reason is None]
    # Without an expansion, the depthwise convolutions of the first stage have the stream's channels.
    assert sorted(group.channels for group in free if group.gates) == sorted([8, 12, 8 * 3, 12 * 3, 20])
    # Squeeze-and-excitation has no norms.
    assert sorted(group.channels for group in free if not group.gates) == sorted([2, 2, 2, 3])
    assert {group.reason for group in groups if group.reason} == {"the model's output", "the model's input"}


def test_invalid_options_raise():
    with pytest.raises(RecipeError, match=r"widths=\[\] must be one or more numbers of at least 1"):
        build("mobilenet", {"widths": []})
    with pytest.raises(RecipeError, match=r"widths=\[8, 0\] must be"):
        build("mobilenet", {"widths": [8, 0]})
    for name in ("blocks", "expansion", "head", "classes"):
        with pytest.raises(RecipeError, match=f"{name}=0 must be at least 1"):
            build("mobilenet", {name: 0})
