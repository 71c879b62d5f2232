"""OpenVINO: its intermediate representation (IR), made from our ONNX file.

IR is two files by its format: the graph as XML, and the numbers that it points into. Two ways to one file were weighed:
a zip of the two, which no OpenVINO can read; and the blob of a compiled model, which is of one machine and one version.
OpenVINO also reads our ``.onnx`` as it is, and that is one file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from prunekit.deployment.export.onnx import add_metadata
from prunekit.deployment.export.validate import largest_difference
from prunekit.errors import ExportError


def export_openvino(onnx_file: bytes, metadata: Mapping[str, str] | None = None) -> tuple[bytes, bytes]:
    """An ONNX file as the ``.xml`` and the ``.bin`` of an IR in float32, input, output and free sizes as there.

    Args:
        metadata: written into the IR's ``rt_info``, below ``prunekit``.

    Raises:
        ExportError: OpenVINO is not installed, or refuses the model.
    """
    openvino = import_openvino()
    with add_metadata("OpenVINO", "openvino"), tempfile.TemporaryDirectory() as folder:
        model = openvino.Core().read_model(onnx_file)
        for key, value in (metadata or {}).items():
            model.set_rt_info(value, ["prunekit", key])
        path = Path(folder) / "model.xml"
        # By default its numbers are halved to 16 bits.
        openvino.save_model(model, str(path), compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def check_openvino(
    xml: bytes, weights: bytes, model: nn.Module, inputs: Sequence[Tensor], name: str = "model.xml"
) -> float:
    """The largest difference between the files in OpenVINO and the model in PyTorch, over these inputs; errors as for
    :func:`prunekit.deployment.export.validate.largest_difference`."""
    return largest_difference(name, openvino_function(xml, weights), model, inputs)


def openvino_function(xml: bytes, weights: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """The files in OpenVINO on the CPU, in float32, as a function of an input."""
    openvino = import_openvino()
    core = openvino.Core()
    model = core.read_model(xml, openvino.Tensor(np.frombuffer(weights, np.uint8)))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: compiled(image)[0]


def import_openvino():
    """The library.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError('OpenVINO is not installed; add it with: pip install "prunekit[openvino]"') from error
    return openvino
