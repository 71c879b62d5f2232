import pytest
import torch

from prunekit.backbones import build
from prunekit.backbones.octresnet import octresnet
from prunekit.backbones.resnet import resnet
from prunekit.errors import RecipeError
from prunekit.flops import count_modules, total
from prunekit.layers.octave_ops import OctaveLayer


def test_same_parameters_as_resnet_and_fewer_macs():
    plain, octave = (total(count_modules(model, (3, 32, 32))[0]) for model in (resnet(), octresnet()))
    assert octave["params"] == plain["params"]
    # Of the four paths of a layer one is at full resolution and three are at a quarter of its positions.
    assert octave["macs"] / plain["macs"] == pytest.approx((1 + 3 / 4) / 4, abs=0.01)


@pytest.mark.parametrize("depth", [8, 20])
def test_every_convolution_is_multi_resolution(depth):
    model = octresnet(depth, 4)
    layers = [name for name, module in model.named_modules() if isinstance(module, OctaveLayer)]
    assert layers == model.octave_layers and len(layers) == depth + 1  # Two shortcuts, and the head is linear.
    assert list(model.octave_left) == ["adaptive_avg_pool2d"]


@pytest.mark.parametrize("split", [[1.0], [1, 0]])
def test_single_branch_equals_resnet(split):
    torch.manual_seed(5)
    plain = resnet(8, 4, 3).eval()
    torch.manual_seed(5)
    octave = octresnet(8, 4, 3, split).eval()
    for size in ((8, 8), (13, 6), (1, 1)):
        image = torch.randn(2, 3, *size)
        assert torch.equal(octave(image), plain(image))


def test_same_seed_gives_same_weights_and_names():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(octresnet(8, 4))
    a, b = (model.state_dict() for model in models)
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert "stage2.0.conv1.mix.paths.1to0.weight" in a and "stage2.0.conv1.norms.1.running_var" in a


@pytest.mark.parametrize("size", [(8, 8), (33, 17), (1, 1), (5, 64)])
@pytest.mark.parametrize("split", [[0.5, 0.5], [0, 1], [0.2, 0.3, 0.5]])
def test_any_image_size(split, size):
    model = octresnet(8, 10, 4, split)
    assert model.train()(torch.randn(2, 3, *size)).shape == (2, 4)


def test_invalid_options_raise():
    with pytest.raises(RecipeError, match="add up to 1"):
        build("octresnet", {"split": [0.5, 0.4]})
    with pytest.raises(RecipeError, match="must be 6n"):
        build("octresnet", {"depth": 9})
