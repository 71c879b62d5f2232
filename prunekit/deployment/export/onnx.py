"""Export to ONNX: one file with dynamic batch size, height and width."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.deployed_model import DeployedModel
from prunekit.deployment.export.onnx_writer import OPSET, UnsupportedOpError, graph_to_onnx
from prunekit.deployment.export.subnormals import flush_subnormals, subnormal_count
from prunekit.deployment.export.validate import max_abs_difference
from prunekit.deployment.graph import InferenceGraph
from prunekit.errors import ExportError


def export_onnx(model: nn.Module, example: Tensor, metadata: Mapping[str, str] | None = None) -> bytes:
    """Export a model to one ONNX file with the input ``image`` and the output ``output``, without source paths.

    Args:
        model: in float32; a copy of it is exported, in eval mode, on the CPU.
        example: an input: (N, C, H, W) float32, or (N, H, W, C) uint8 for a model with preprocessing.
        metadata: written into the file's ``metadata_props``.

    Raises:
        ExportError: an operation cannot be exported.
    """
    import onnx

    if isinstance(model, DeployedModel) and example.is_floating_point():
        try:
            return finalize(graph_to_onnx(InferenceGraph(model.network, example)), metadata or {})
        except (UnsupportedOpError, ExportError):
            pass  # torch.onnx supports more operations.
    model, example = prepare_for_export(model, example)
    quiet = silence("torch.onnx", "onnxscript", "onnx_ir")
    with export_errors("ONNX", "onnx"), quiet, tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["output"],
            dynamic_shapes=(dynamic_axes(example),),
            external_data=False,
            verbose=False,
        )
        path = Path(folder) / "model.onnx"
        program.save(str(path), external_data=False)
        file = onnx.load(str(path))
    return finalize(file, metadata or {})


def check_onnx(file: bytes, model: nn.Module, inputs: Sequence[Tensor], name: str = "model.onnx") -> float:
    """Compare the file in ONNX Runtime with the model; see :func:`.validate.max_abs_difference`."""
    return max_abs_difference(name, onnx_function(file), model, inputs)


def onnx_function(file: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """The file in ONNX Runtime on all CPU cores, as a function of an input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def dynamic_axes(example: Tensor) -> dict[int, object]:
    """The dynamic axes of an input: the batch and, for images, height and width."""
    axes = {4: (0, 1, 2) if example.dtype == torch.uint8 else (0, 2, 3)}.get(example.dim(), (0,))
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def prepare_for_export(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the model for inference on the CPU, and a batch of at least 2 inputs."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    example = example.detach().cpu()
    example = example.float() if example.is_floating_point() else example
    # A batch size of 1 would be exported as a constant.
    return model, torch.cat([example, example]) if len(example) < 2 else example


@contextmanager
def silence(*loggers: str) -> Iterator[None]:
    """Let only errors through from these loggers ("" is the root), and no warnings."""
    levels = {log: log.level for log in map(logging.getLogger, loggers)}
    try:
        for log in levels:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


@contextmanager
def export_errors(title: str, key: str) -> Iterator[None]:
    """Turn any error of an exporter into an ExportError of one line."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"the model cannot be exported to {title}: {reason}; skip it with export.{key}=false"
        ) from error


def finalize(file: object, metadata: Mapping[str, str]) -> bytes:
    """Serialize an ONNX model: source information and subnormal numbers removed, metadata added, checked."""
    import onnx

    _strip(file)
    for key, value in metadata.items():
        file.metadata_props.add(key=key, value=value)
    for tensor in tensors(file):
        values = onnx.numpy_helper.to_array(tensor)
        if subnormal_count(values):
            tensor.CopyFrom(onnx.numpy_helper.from_array(flush_subnormals(values), tensor.name))
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString(deterministic=True)


def tensors(file: object) -> Iterator[object]:
    """All weights and constants, including those of subgraphs."""
    import onnx

    graphs = [file.graph]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for attribute in (a for node in graph.node for a in node.attribute):
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _strip(file: object) -> None:
    """Remove source paths, line numbers and names of local variables."""
    file.producer_version = ""
    del file.metadata_props[:]
    for graph in [file.graph, *file.functions]:
        values = [value for name in ("input", "output", "initializer") for value in getattr(graph, name, [])]
        for part in [graph, *graph.node, *graph.value_info, *values]:
            for field in ("metadata_props", "doc_string"):
                if hasattr(part, field):
                    part.ClearField(field)
