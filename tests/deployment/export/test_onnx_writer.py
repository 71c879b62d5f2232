"""ONNX written from a deployed graph: as torch.onnx would have it, for any size and for one."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.deployed_models import learned
from torch import nn

from prunekit.deployment.deploy import FORMS
from prunekit.deployment.export.onnx_writer import Unknown, emit
from prunekit.deployment.form import Form
from prunekit.deployment.graph import Graph
from prunekit.deployment.rewrite import rewrite

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")


def compute(file: onnx.ModelProto, image: torch.Tensor) -> np.ndarray:
    onnx.checker.check_model(file, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image.numpy()})[0]


@pytest.mark.parametrize("form", [Form(), FORMS["onnxruntime"][0], Form(8, inputs=True)])
def test_a_learned_csnet_at_any_size(form):
    model, example = learned("csnet", 2, width=10)
    file = emit(rewrite(model, example, form))
    for shape in ((1, 3, 32, 32), (2, 3, 64, 48), (1, 3, 37, 51)):
        image = torch.randn(*shape)
        assert np.abs(compute(file, image) - model(image).detach().numpy()).max() < 1e-4


def test_for_one_size_the_up_samplings_have_factors():
    model, example = learned("csnet", 0, width=10)
    file = emit(rewrite(model, example, Form(8)), fixed=True)
    assert not any(node.op_type == "Shape" for node in file.graph.node)
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [0, 3, 32, 32]
    image = torch.randn(3, 3, 32, 32)
    assert np.abs(compute(file, image) - model(image).detach().numpy()).max() < 1e-4


@pytest.mark.parametrize(("name", "options"), [("octresnet", {"depth": 8, "width": 8}), ("resnet", {"depth": 8})])
def test_other_backbones(name, options):
    model, example = learned(name, 0, 0.3, **options)
    try:
        file = emit(rewrite(model, example, Form(sums=True)))
    except Unknown as unknown:
        pytest.fail(f"{unknown} is not written")
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
def test_what_is_not_known_is_said(model):
    with pytest.raises(Unknown):
        emit(Graph(model.eval(), torch.zeros(2, 3, 16, 16)))
