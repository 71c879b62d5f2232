import pytest
import torch
from helpers.networks import small_csnet
from helpers.zoo import ZOO
from torch import nn

from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.parameter_slices import ParameterSlices


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("name", ["vgg", "resnext", "mobilenet_v2", "shufflenet_v1", "unet_transposed", "csnet"])
def test_sizes_equal_what_pruning_removes(name, norms):
    """The sum of ones is the size; so is the sum over the members."""
    model = small_csnet() if name == "csnet" else ZOO[name]()
    groups = [group for group in find_groups(model, torch.randn(2, 3, 32, 32)) if group.reason is None]
    slices = ParameterSlices(model, groups, norms)
    assert torch.equal(slices.sum(torch.ones_like).double(), slices.sizes)
    for group in groups:
        kinds = [(model.get_submodule(m.tensor.rpartition(".")[0]), m) for m in group.members]
        kinds = [
            (module, m) for module, m in kinds if m.tensor.endswith(".weight") and not isinstance(module, nn.PReLU)
        ]
        kinds = [(module, m) for module, m in kinds if norms or not isinstance(module, nn.BatchNorm2d)]
        size = 0
        for module, member in kinds:
            # Each input channel of a grouped convolution is read by one group only.
            grouped = member.reads and isinstance(module, nn.Conv2d) and module.groups > 1
            share = module.weight.numel() // module.weight.shape[member.axis] // (module.groups if grouped else 1)
            size += share * member.stride
        assert set(slices.part(slices.sizes, group).tolist()) == {size}
        assert set(slices.part(slices.members, group).tolist()) == {len(kinds)}


def test_sizes_of_a_residual_stream():
    """A stream of width 8 with 3×3 convolutions: producers, readers, their norms, the shortcut and the head."""
    model = ZOO["resnet_basic"]()
    groups = find_groups(model, torch.randn(2, 3, 32, 32))
    stream = next(group for group in groups if group.id == "layers.1.0.conv2")
    slices = ParameterSlices(model, [stream])
    producers = 2 * 8 * 9 + 6  # conv2 of two blocks, and a 1×1 shortcut from 6 channels
    assert set(slices.sizes.tolist()) == {producers + 3 + 8 * 9 + 10}
