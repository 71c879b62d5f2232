"""ONNX: one file that needs no prunekit, with dynamic height and width."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import ExportError

OPSET = 20
# ONNX Runtime adds in another order, so the two agree in float32's own digits only.
TOLERANCE = 1e-4


def export_onnx(model: nn.Module, example: Tensor) -> bytes:
    """The model as one ONNX file: input ``image`` (N, C, H, W) float32, output ``output``; N, H and W are free.

    No source path and no trace of this machine is left in the file.

    Args:
        model: in float32; a copy of it is exported, in eval mode, on the CPU.
        example: a batch of at least two images.

    Raises:
        ExportError: an operation cannot be exported.
    """
    import onnx

    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    example = example.detach().float().cpu()
    if len(example) < 2:
        # A batch of one would be taken for a constant.
        example = torch.cat([example, example])
    axes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["output"],
                dynamic_shapes=(axes if example.dim() == 4 else {0: torch.export.Dim.DYNAMIC},),
                external_data=False,
                verbose=False,
            )
            path = Path(folder) / "model.onnx"
            program.save(str(path), external_data=False)
            file = onnx.load(str(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"the model cannot be exported to ONNX: {reason}; skip it with export.onnx=false") from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
    _strip(file)
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString(deterministic=True)


def check_onnx(file: bytes, model: nn.Module, inputs: list[Tensor]) -> float:
    """The largest difference between the file in ONNX Runtime and the model in PyTorch, over these inputs.

    Raises:
        ExportError: it is more than 1e-4 · max(1, max|output|).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    model = copy.deepcopy(model).cpu().eval()
    worst = 0.0
    for batch in inputs:
        batch = batch.detach().float().cpu()
        with torch.inference_mode():
            wanted = model(batch).numpy()
        given = session.run(None, {"image": batch.numpy()})[0]
        gap = float(np.abs(given - wanted).max())
        worst = max(worst, gap)
        if not gap <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise ExportError(f"model.onnx differs from the model by {gap:.2g} on an input of {tuple(batch.shape)}")
    return worst


def _strip(file: object) -> None:
    """Take out what the exporter tells about the source: paths, line numbers, names of local variables."""
    file.producer_version = ""
    del file.metadata_props[:]
    for graph in [file.graph, *file.functions]:
        for part in [
            graph,
            *graph.node,
            *graph.value_info,
            *getattr(graph, "input", []),
            *getattr(graph, "output", []),
        ]:
            if hasattr(part, "metadata_props"):
                del part.metadata_props[:]
            if hasattr(part, "doc_string"):
                part.ClearField("doc_string")
        for tensor in getattr(graph, "initializer", []):
            tensor.ClearField("doc_string")
