import numpy as np
import onnx
import torch
from torch import nn

from prunekit.deployment.deployed_model import DeployConfig
from prunekit.deployment.export.onnx import onnx_function
from prunekit.deployment.export.onnx_writer import graph_to_onnx
from prunekit.deployment.export.quantize import quantize_onnx
from prunekit.deployment.rewrite import rewrite


def test_all_convolutions_but_the_last_are_quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    images = torch.randn(4, 3, 16, 16)
    file = graph_to_onnx(rewrite(model, images, DeployConfig())).SerializeToString()
    quantized = quantize_onnx(file, [image[None].numpy() for image in images], {"precision": "int8"})
    graph = onnx.load_from_string(quantized)
    assert [(p.key, p.value) for p in graph.metadata_props] == [("precision", "int8")]
    producers = {output: node.op_type for node in graph.graph.node for output in node.output}
    convs = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert [producers.get(conv.input[1]) for conv in convs] == ["DequantizeLinear", "DequantizeLinear", None]
    with torch.inference_mode():
        expected = model(images[:1]).numpy()
    difference = np.abs(onnx_function(quantized)(images[:1].numpy()) - expected).max()
    assert 0 < difference < 0.1 * np.abs(expected).max()
