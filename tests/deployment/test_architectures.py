"""Every pass, and the export, on networks of many kinds."""

import onnx
import pytest
from helpers.architectures import ARCHITECTURES

from prunekit.deployment.deploy import CANDIDATES, deploy
from prunekit.deployment.export.onnx import check_onnx, export_onnx
from prunekit.deployment.rewrite import build_deployed, rewrite
from prunekit.deployment.values import compute, difference

pytestmark = pytest.mark.filterwarnings("ignore::prunekit.errors.PrunekitWarning")
CONFIGS = list(dict.fromkeys(config for configs in CANDIDATES.values() for config in configs))
# The others take seconds in torch.onnx.
QUICK = "one_size adaptive_max resize_if_needed dict two_inputs audio resnet_basic".split()


@pytest.mark.parametrize("name", [name for name, case in ARCHITECTURES.items() if case.traceable])
def test_every_pass_keeps_the_outputs(name):
    model, example, inputs = ARCHITECTURES[name].make()
    expected = [compute(model, batch) for batch in inputs]
    for config in CONFIGS if name != "deep" else CONFIGS[:1]:
        deployed = build_deployed(rewrite(model, example, config), config)
        for batch, wanted in zip(inputs, expected, strict=True):
            assert difference(compute(deployed, batch), wanted)[1], config


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ARCHITECTURES])
def test_onnx_file_of_the_deployed_form(name):
    case = ARCHITECTURES[name]
    model, example, inputs = case.make()
    deployed, record = deploy(model, example, runtime="onnxruntime", measure=False)
    assert (record.fallback_reason is None) is case.traceable
    file = export_onnx(deployed, example)
    check_onnx(file, model, inputs if case.free else inputs[:2])
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.load_from_string(file).graph.input
    ]
    sides = {3: ["L"], 4: ["H", "W"], 5: ["D", "H", "W"]}.get(example[0].dim(), []) if case.free else None
    for value, shape in zip(example, shapes, strict=True):
        channels, lengths = list(value.shape[1:2]), list(value.shape[2:])
        assert shape == ["N", *channels, *(lengths if sides is None else sides)]
