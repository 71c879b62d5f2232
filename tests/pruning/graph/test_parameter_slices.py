import pytest
import torch
from helpers.zoo import ZOO
from torch import nn

from prunekit.backbones.csnet import csnet
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.graph.parameter_slices import ParameterSlices


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("name", ["vgg", "resnext", "mobilenet_v2", "shufflenet_v1", "unet_transposed", "csnet"])
def test_slices_are_what_a_cut_takes_away(name, norms):
    """Ones summed are sizes, and one member after another gives the same."""
    model = csnet(10) if name == "csnet" else ZOO[name]()
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
            # Of the input axis of a convolution with groups, a channel is read by one group alone.
            grouped = member.reads and isinstance(module, nn.Conv2d) and module.groups > 1
            share = module.weight.numel() // module.weight.shape[member.axis] // (module.groups if grouped else 1)
            size += share * member.stride
        assert set(slices.part(slices.sizes, group).tolist()) == {size}
        assert set(slices.part(slices.members, group).tolist()) == {len(kinds)}


def test_the_size_of_a_residual_channel():
    """3×3 convolutions of a stream 8 wide: two makers, two readers and their norms, the shortcut, the head."""
    model = ZOO["resnet_basic"]()
    groups = find_groups(model, torch.randn(2, 3, 32, 32))
    stream = next(group for group in groups if group.id == "layers.1.0.conv2")
    slices = ParameterSlices(model, [stream])
    makers = 2 * 8 * 9 + 6  # conv2 of two blocks, and a 1×1 shortcut from 6 channels
    assert set(slices.sizes.tolist()) == {makers + 3 + 8 * 9 + 10}
