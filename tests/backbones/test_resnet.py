import pytest
import torch

from prunekit.backbones import build
from prunekit.backbones.resnet import resnet
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, total
from prunekit.pruning.graph.groups import find_groups


@pytest.mark.parametrize(("depth", "million"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_match_the_paper(depth, million):
    """Table 6 of the paper; the projections of option B are 2,752 more than its identities."""
    found = total(count_modules(resnet(depth), (3, 32, 32))[0])["params"]
    assert found - 2752 == pytest.approx(million * 1e6, rel=0.02)
    assert sum(p.numel() for p in resnet(depth).parameters()) == found


def test_macs_match_hand_computed_value():
    convs = [m for m in resnet(20).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 19 + 2 and [c.stride for c in convs].count((2, 2)) == 4
    # 32×32: the stem and six of 16 channels; then five and a half of 32 at 16×16, and of 64 at 8×8.
    plane = 16 * 16 * 9 * 1024
    by_hand = 3 * 16 * 9 * 1024 + 6 * plane + 2 * (plane // 2 + 5 * plane) + 2 * (16 * 32 * 256) + 640
    assert total(count_modules(resnet(20), (3, 32, 32))[0])["macs"] == by_hand


@pytest.mark.parametrize("size", [(8, 8), (33, 47), (1, 1)])
def test_any_image_size(size):
    assert resnet(8, 4, 7).eval()(torch.randn(2, 3, *size)).shape == (2, 7)


def test_all_channels_after_the_input_can_be_pruned():
    groups = find_groups(resnet(20), torch.randn(2, 3, 16, 16))
    free = [group for group in groups if group.reason is None]
    # One for each stage's sum, with the stem's, and one inside each of the nine blocks.
    assert sorted(group.channels for group in free) == sorted([16, 32, 64] * 4)
    sums = [group for group in free if len(group.gates) > 1]
    assert sorted(len(group.gates) for group in sums) == [4, 4, 4]


def test_invalid_options_raise():
    for depth, fix in ((18, "set it to 14 or 20"), (3, "set it to 8 or 14"), (21, "set it to 20 or 26")):
        with pytest.raises(RecipeError, match=f"depth={depth} must be 6n \\+ 2; {fix}"):
            build("resnet", {"depth": depth})
    with pytest.raises(RecipeError, match="at least 1"):
        build("resnet", {"width": 0})
    with pytest.raises(RecipeError, match="at least 1"):
        build("resnet", {"classes": 0})
