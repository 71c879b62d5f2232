import pytest
import torch

from prunekit.backbones import build
from prunekit.backbones.csnet import csnet
from prunekit.errors import PluginError, RecipeError
from prunekit.flops import count_modules, total


@pytest.mark.parametrize(
    "width, params, paper_flops, macs",
    [(20, 210_985, 610_638_784, 432_819_744), (40, 788_631, 1_872_279_024, None)],
)
def test_counts_match_published_values(width, params, paper_flops, macs):
    found = total(count_modules(csnet(width), (3, 224, 224))[0])
    assert found["params"] == params
    assert found["paper_flops"] == paper_flops
    assert macs in (None, found["macs"])


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (16, 61), (1, 1)])
def test_any_image_size(size):
    model = csnet(10).train()
    assert model(torch.randn(2, 3, *size)).shape == (2, 1, *size)


def test_blocks_of_the_stages():
    model = csnet(10, blocks=(1, 1, 2, 3))
    assert [len(getattr(model, f"stage{stage}")) for stage in range(5)] == [1, 1, 1, 2, 3]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1, 32, 32)


@pytest.mark.parametrize("blocks", [(3, 4, 6), (3, 4, 6, 0), (3, 4, 6, 4.5), (3, 4, 6, True)])
def test_invalid_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match=r"must be four whole numbers above 0 \(published: \[3, 4, 6, 4\]\)"):
        csnet(10, blocks=blocks)


def test_split_with_three_branches_or_one():
    assert csnet(20, [0.5, 0.25, 0.25])(torch.randn(2, 3, 32, 32)).shape == (2, 1, 32, 32)
    one = csnet(20, [1.0])
    assert one(torch.randn(2, 3, 32, 32)).shape == (2, 1, 32, 32)
    assert not any("to1" in name for name, _ in one.named_modules() if name.startswith("stage"))


def test_step_scales_cover_depthwise_and_dilated_weights():
    model = csnet(20)
    scales = model.step_scales()
    assert len(scales) == 81 and set(scales.values()) == {100.0}
    convs = dict(model.named_modules())
    for name in scales:
        conv = convs[name.removesuffix(".weight")]
        assert conv.groups > 1 or conv.padding == conv.dilation


def test_invalid_options_raise():
    with pytest.raises(RecipeError, match=r"width=.* must be at least 8"):
        build("csnet", {"width": 2})
    with pytest.raises(RecipeError, match="add up to 1"):
        build("csnet", {"split": [0.5, 0.2]})
    with pytest.raises(RecipeError, match="did you mean 'csnet'"):
        build("csnett")


def test_backbone_from_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef net(n=1):\n    return torch.nn.Conv2d(3, n, 1)\ndef wrong():\n    return 3\n")
    assert build("net", {"n": 4}, str(file)).out_channels == 4
    with pytest.raises(PluginError, match="returned int, not a"):
        build("wrong", {}, str(file))
    with pytest.raises(PluginError, match="did you mean 'net'"):
        build("nett", {}, str(file))
    with pytest.raises(RecipeError, match="does not exist"):
        build("net", {}, str(tmp_path / "other.py"))
    file.write_text("import nothing_of_this_name")
    with pytest.raises(PluginError, match="fails to import"):
        build("net", {}, str(file))
