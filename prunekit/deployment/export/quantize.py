"""Post-training quantization to int8 with ONNX Runtime, calibrated on data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prunekit.deployment.export.onnx import export_errors, finalize, silence


def quantize_onnx(file: bytes, batches: Sequence[np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Quantize a float32 ONNX file in QDQ format, with weights per channel; OpenVINO reads it too.

    The last convolution stays in float32. ``batches`` are inputs to calibrate on, all of one shape.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        inputs = iter([{"image": batch} for batch in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    with export_errors("int8", "int8"), silence(""), tempfile.TemporaryDirectory() as folder:
        source, inferred, target = (str(Path(folder) / f"{name}.onnx") for name in ("source", "inferred", "target"))
        Path(source).write_bytes(file)
        quant_pre_process(source, inferred, skip_symbolic_shape=True)
        model = onnx.load(inferred)
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{index}"  # Nodes are excluded by name; fused ones may have none.
        onnx.save(model, inferred)
        quantize_static(
            inferred,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7-bit weights: without VNNI, products of 8 bits saturate.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "Conv"][-1:],
        )
        quantized = onnx.load(target)
    return finalize(quantized, metadata or {})
