import pytest
import torch
from architectures import NETWORKS, TINY, deep_densenet, deep_resnet
from torch import nn

# As published with torchvision's models.
PARAMS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "densenet121": 7_978_856, "densenet201": 20_013_928}


@pytest.mark.parametrize("name", PARAMS)
def test_full_size_networks_have_the_known_number_of_parameters(name):
    with torch.device("meta"):
        model = NETWORKS[name]()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]
    last = "layer4.1.conv2" if name.startswith("resnet") else "features.denseblock4.denselayer16.conv2"
    assert last in dict(model.named_modules())


@pytest.mark.parametrize(("build", "layers"), [(deep_resnet, 8), (deep_densenet, 8)])
def test_a_deeper_network_is_deeper_by_as_many_layers(build, layers):
    def depth(model):
        return sum(
            isinstance(m, nn.Conv2d | nn.Linear) for name, m in model.named_modules() if "downsample" not in name
        )

    assert depth(build(3)) - depth(build(2)) == layers


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_one_runs(name):
    assert TINY[name]().eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)
