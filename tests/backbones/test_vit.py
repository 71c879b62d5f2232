import pytest
import torch

from prunekit.backbones import build
from prunekit.backbones.vit import vit
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, total
from prunekit.pruning.graph.groups import find_groups


def test_parameters_by_hand():
    # A block: two LayerNorms, four projections of the tokens, and the perceptron.
    block = 2 * 2 * 96 + 4 * (96 * 96 + 96) + (96 * 384 + 384) + (384 * 96 + 96)
    by_hand = (48 * 96 + 96) + 64 * 96 + 6 * block + 2 * 96 + (96 * 10 + 10)
    assert total(count_modules(vit(6, 96), (3, 32, 32))[0])["params"] == by_hand


@pytest.mark.parametrize("options", [(1, 8, 2), (2, 12, 3, 20), (1, 6, 1, None, 2, 8), (1, 8, 8, 1, 16, 16)])
def test_shapes(options):
    model = vit(*options, classes=7)
    size = options[5] if len(options) > 5 else 32
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_tokens_and_their_positions_matter():
    torch.manual_seed(0)
    model, image = vit(2, 16, 2).eval(), torch.randn(1, 3, 32, 32)
    moved = image.roll(4, dims=3)  # by one patch: the same tokens at other positions
    assert (model(image) - model(moved)).abs().max() > 1e-3
    torch.nn.init.zeros_(model.position)
    assert torch.allclose(model(image), model(moved), atol=1e-5)


def test_inner_widths_and_the_stream_can_be_pruned():
    groups = find_groups(vit(3, 24, 4), torch.randn(2, 3, 32, 32))
    free = [group for group in groups if group.reason is None]
    # The stream, and in each block the heads, their channels, and the perceptron.
    assert sorted(group.channels for group in free) == sorted([24] + 3 * [4, 6, 96])
    assert not any(group.gates for group in free)
    # What has statistics over channels changes the output if it is cut; the recipe leaves out the layer it begins with.
    assert [group.id for group in free if group.statistics] == ["patches"]


def test_invalid_options_raise():
    for options, fix in (
        ({"width": 90}, "width=90 must be a multiple of heads; set it to 88"),
        ({"width": 1}, "width=1 must be a multiple of heads; set it to 4"),
        ({"size": 30}, "size=30 must be a multiple of patch; set it to 32"),
        ({"size": 2}, "size=2 must be a multiple of patch; set it to 4"),
        *(({name: 0}, f"{name}=0 must be at least 1") for name in ("depth", "heads", "hidden", "patch", "classes")),
    ):
        with pytest.raises(RecipeError, match=fix):
            build("vit", options)
