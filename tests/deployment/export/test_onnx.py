import numpy as np
import onnx
import pytest
import torch
from helpers.deployed_models import pruned_model
from torch import nn

from prunekit.deployment.export.onnx import check_onnx, export_onnx, onnx_function
from prunekit.deployment.export.openvino import openvino_function
from prunekit.errors import ExportError


@pytest.fixture(scope="module")
def exported():
    # It has paths and branches as CSNet has, with a tenth of the nodes: torch.onnx is slow.
    model, example = pruned_model("octresnet", 1, depth=8, width=8)
    return model, export_onnx(model, example)


def test_outputs_match_pytorch_at_any_batch_and_size(exported):
    model, file = exported
    sizes = [(4, 32, 32), (1, 32, 32), (2, 61, 75), (1, 33, 47), (3, 224, 160)]
    inputs = [torch.randn(n, 3, h, w) for n, h, w in sizes]
    assert check_onnx(file, model, inputs) < 1e-4


@pytest.mark.parametrize("start", [onnx_function, openvino_function])
def test_function_for_known_shapes_has_the_same_outputs_and_takes_no_others(exported, start):
    _, file = exported
    image = torch.randn(2, 3, 33, 47).numpy()
    known = start(file, shapes=[image.shape])
    assert np.abs(known(image) - start(file)(image)).max() < 1e-4
    with pytest.raises(Exception, match=r"(?i)dimension|shape"):
        known(image[:1])


def test_file_has_dynamic_axes_and_no_source_paths(exported):
    _, file = exported
    for word in (b"/prunekit", b".py", b"site-packages", b"stack_trace", b"/tmp"):
        assert word not in file
    graph = onnx.load_from_string(file).graph
    assert [dim.dim_param != "" for dim in graph.input[0].type.tensor_type.shape.dim] == [True, False, True, True]
    assert (graph.input[0].name, graph.output[0].name) == ("image", "output")
    assert not any(tensor.external_data for tensor in graph.initializer)


def test_file_of_another_model_is_rejected(exported):
    _model, file = exported
    other, _ = pruned_model("octresnet", 2, depth=8, width=8)
    with pytest.raises(ExportError, match="differs from the model"):
        check_onnx(file, other, [torch.randn(1, 3, 32, 32)])


def test_unsupported_operation_is_a_one_line_error():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="cannot be exported to ONNX") as error:
        export_onnx(Odd(), torch.randn(2, 3, 8, 8))
    assert "\n" not in str(error.value)
