"""Export to OpenVINO's intermediate representation (IR): an ``.xml`` and a ``.bin`` file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunekit.deployment.export.onnx import export_errors
from prunekit.deployment.export.validate import max_abs_difference
from prunekit.deployment.values import Inputs
from prunekit.errors import ExportError


def export_openvino(onnx_file: bytes, metadata: Mapping[str, str] | None = None) -> tuple[bytes, bytes]:
    """Convert an ONNX file to the ``.xml`` and ``.bin`` of an IR in float32, with the metadata as ``rt_info``."""
    openvino = import_openvino()
    with export_errors("OpenVINO", "openvino"), tempfile.TemporaryDirectory() as folder:
        model = openvino.Core().read_model(onnx_file)
        for key, value in (metadata or {}).items():
            model.set_rt_info(value, ["prunekit", key])
        path = Path(folder) / "model.xml"
        openvino.save_model(model, str(path), compress_to_fp16=False)  # The default is True.
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def check_openvino(
    xml: bytes, weights: bytes, model: nn.Module, inputs: Sequence[Inputs], name: str = "model.xml"
) -> float:
    """Compare the files in OpenVINO with the model; see :func:`.validate.max_abs_difference`."""
    return max_abs_difference(name, openvino_function(xml, weights), model, inputs)


def openvino_function(
    file: bytes, weights: bytes | None = None, precision: str = "f32", shapes: Sequence[Sequence[int]] = ()
) -> Callable[..., Any]:
    """An ONNX file, or the ``.xml`` and ``.bin`` of an IR, computed in "f32" or "bf16" on the CPU.

    As :func:`.onnx.onnx_function`, it returns a list of several outputs, and may know the ``shapes`` of its inputs.
    """
    openvino = import_openvino()
    core = openvino.Core()
    parts = [file] if weights is None else [file, openvino.Tensor(np.frombuffer(weights, np.uint8))]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = core.read_model(*parts)
    if shapes:
        model.reshape({value: list(shape) for value, shape in zip(model.inputs, shapes, strict=True)})
    compiled = core.compile_model(model, "CPU", options)

    def run(*arrays: np.ndarray) -> Any:
        outputs = list(compiled(arrays).values())
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def import_openvino() -> Any:
    """Import the library, or raise ExportError if it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise ExportError('OpenVINO is not installed; add it with: pip install "prunekit[openvino]"') from error
    return openvino
