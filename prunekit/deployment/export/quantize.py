"""int8 after training: ONNX Runtime's static quantisation, calibrated on data.

Weights get a scale for each channel, and every operator that can be computed in int8 stands between a quantiser and its
inverse (QDQ), which ONNX Runtime and OpenVINO both read.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from prunekit.deployment.export.onnx import add_metadata, finalize, quiet

Method = Literal["minmax", "entropy", "percentile"]


def quantize_onnx(
    file: bytes,
    batches: Sequence[np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    method: Method = "minmax",
    exclude: Callable[[object, object], bool] | None = None,
) -> bytes:
    """A float32 ONNX file in int8.

    Args:
        file: from :func:`prunekit.deployment.export.onnx.export_onnx`.
        batches: inputs of the file to calibrate on, all of one shape.
        metadata: written into the file.
        method: how a range is taken from what was seen.
        exclude: (node, model) → whether a node stays in float32.

    Raises:
        ExportError: ONNX Runtime's tools refuse the model.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"image": batch}

    with add_metadata("int8", "int8"), quiet([logging.getLogger()]), tempfile.TemporaryDirectory() as folder:
        source, inferred, target = (Path(folder) / f"{name}.onnx" for name in ("source", "inferred", "target"))
        source.write_bytes(file)
        quant_pre_process(str(source), str(inferred), skip_symbolic_shape=True)
        model = onnx.load(str(inferred))
        for number, node in enumerate(model.graph.node):
            # Nodes are left out by name, and one that is fused from others may have none.
            node.name = node.name or f"node_{number}"
        onnx.save(model, str(inferred))
        left = [node.name for node in model.graph.node if exclude is not None and exclude(node, model)]
        quantize_static(
            str(inferred),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Seven bits for weights: without VNNI the products of eight overflow, and are cut off.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method={
                "minmax": CalibrationMethod.MinMax,
                "entropy": CalibrationMethod.Entropy,
                "percentile": CalibrationMethod.Percentile,
            }[method],
            nodes_to_exclude=left,
        )
        found = onnx.load(str(target))
    return finalize(found, metadata or {})


def depthwise(node: object, model: object) -> bool:
    """Whether a node is a convolution of each channel by itself."""
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    return node.op_type == "Conv" and groups > 1


def last_convolution(node: object, model: object) -> bool:
    """Whether a node is the network's last convolution."""
    return node.name == [other.name for other in model.graph.node if other.op_type == "Conv"][-1]
