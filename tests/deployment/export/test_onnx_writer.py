import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from helpers.deployed_models import pruned_model
from torch import nn

from prunekit.deployment.deploy import CANDIDATES
from prunekit.deployment.deployed_model import DeployConfig
from prunekit.deployment.export.onnx_writer import UnsupportedOpError, graph_to_onnx
from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.rewrite import rewrite

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def compute(file: onnx.ModelProto, image: torch.Tensor) -> np.ndarray:
    onnx.checker.check_model(file, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image.numpy()})[0]


@pytest.mark.parametrize("config", [DeployConfig(), CANDIDATES["onnxruntime"][0], DeployConfig(8)])
def test_pruned_csnet_at_any_size(config):
    model, example = pruned_model("csnet", 2, width=10)
    file = graph_to_onnx(rewrite(model, example, config))
    for shape in ((1, 3, 32, 32), (2, 3, 64, 48), (1, 3, 37, 51)):
        image = torch.randn(*shape)
        assert np.abs(compute(file, image) - model(image).detach().numpy()).max() < 1e-4


def test_fixed_size_uses_constant_upsampling_factors():
    model, example = pruned_model("csnet", 0, width=10)
    file = graph_to_onnx(rewrite(model, example, DeployConfig(8)), fixed_size=True)
    assert not any(node.op_type == "Shape" for node in file.graph.node)
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [0, 3, 32, 32]
    image = torch.randn(3, 3, 32, 32)
    assert np.abs(compute(file, image) - model(image).detach().numpy()).max() < 1e-4


class Resized(nn.Module):
    """A convolution and several resizings."""

    def __init__(self, *sides):
        super().__init__()
        self.conv, self.sides = nn.Conv2d(1, 1, 1), sides

    def forward(self, x):
        x = self.conv(x)
        for side in self.sides:
            x = F.interpolate(x, size=(side, 1), mode="bilinear")
        return x


# 31/7 in float32 is a little less; 1000/999 and 1001/1000 are equal in six digits. Wrong ones give other sizes.
@pytest.mark.parametrize("sides", [(7, 31), (999, 1000, 1001)])
def test_fixed_upsampling_factors_are_exact_enough(sides):
    model, example = Resized(*sides[1:]).eval(), torch.randn(2, 1, sides[0], 1)
    file = graph_to_onnx(rewrite(model, (example,), DeployConfig()), fixed_size=True)
    assert np.abs(compute(file, example) - model(example).detach().numpy()).max() < 1e-2


@pytest.mark.parametrize(("name", "options"), [("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})])
def test_resnets(name, options):
    model, example = pruned_model(name, 0, 0.3, **options)
    try:
        file = graph_to_onnx(rewrite(model, example, DeployConfig(merge_sums=True)))
    except UnsupportedOpError as unknown:
        pytest.fail(f"unsupported: {unknown}")
    image = torch.randn(3, 3, 32, 32)
    assert np.abs(compute(file, image) - model(image).detach().numpy()).max() < 1e-4


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
        nn.Identity(),
    ],
)
def test_unsupported_operations_are_named(model):
    with pytest.raises(UnsupportedOpError):
        graph_to_onnx(InferenceGraph(model.eval(), torch.zeros(2, 3, 16, 16)))
