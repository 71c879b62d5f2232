"""Export to ONNX: one file with dynamic batch size, height and width."""

from __future__ import annotations

import inspect
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.deployed_model import DeployedModel
from prunekit.deployment.export.axes import Free, dynamic_shapes, export_with_free_axes, free_axes
from prunekit.deployment.export.onnx_writer import OPSET, graph_to_onnx
from prunekit.deployment.export.subnormals import flush_subnormals, subnormal_count
from prunekit.deployment.export.validate import max_abs_difference
from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.values import Inputs, as_inputs, compute, eval_copy, output_names
from prunekit.errors import ExportError
from prunekit.utils.text import first_line

Metadata = Mapping[str, str] | Callable[[list[str | int]], Mapping[str, str]]


def export_onnx(model: nn.Module, example: Inputs, metadata: Metadata | None = None) -> bytes:
    """Export a model to one ONNX file without source paths.

    The input is called ``image``, or as the arguments of the model's forward if there are several; the output
    ``output``, or as the keys or places of several. Free axes are called N, H and W. Sides that the model takes one
    length of, or that the exporter cannot leave free, are fixed.

    Args:
        model: in float32; a copy of it is exported, in eval mode, on the CPU.
        example: an input: (N, C, H, W) float32, or (N, H, W, C) uint8 for a model with preprocessing; a tuple of
            several.
        metadata: written into the file's ``metadata_props``; or a function of the shape of the first input.

    Raises:
        ExportError: the model fails on the example, or an operation cannot be exported.
    """
    compute(model, example)
    file = export_with_free_axes(
        lambda free: _export(model, example, free),
        lambda file, inputs: check_onnx(finalize(file, {}), model, inputs),
        model,
        example,
    )
    return finalize(file, metadata(_input_shape(file)) if callable(metadata) else metadata or {})


def _export(model: nn.Module, example: Inputs, free: Free) -> Any:
    import onnx

    inputs = as_inputs(example)
    if isinstance(model, DeployedModel):
        model = model.network
        if inputs[0].is_floating_point() and free != "none":
            try:
                return graph_to_onnx(InferenceGraph(model, inputs), fixed_size=free == "batch")
            except Exception:
                pass  # torch.onnx supports more operations, and its errors are for the user.
    model, inputs = prepare_for_export(model, inputs, free)
    names = _input_names(model, len(inputs))
    quiet = silence("torch.onnx", "onnxscript", "onnx_ir")
    with export_errors("ONNX", "onnx"), quiet, tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=output_names(model, inputs),
            dynamic_shapes=dynamic_shapes(model, inputs, free),
            external_data=False,
            verbose=False,
        )
        path = Path(folder) / "model.onnx"
        program.save(str(path), external_data=False)
        file = onnx.load(str(path))
    _name_axes(file, [free_axes(value, free) for value in inputs])
    return file


def check_onnx(file: bytes, model: nn.Module, inputs: Sequence[Inputs], name: str = "model.onnx") -> float:
    """Compare the file in ONNX Runtime with the model; see :func:`.validate.max_abs_difference`."""
    return max_abs_difference(name, onnx_function(file), model, inputs)


def onnx_function(file: bytes, shapes: Sequence[Sequence[int]] = ()) -> Callable[..., Any]:
    """The file in ONNX Runtime with as many threads as PyTorch, as a function of its inputs; it returns a list of
    several outputs.

    With ``shapes``, those of its inputs are always these. ONNX Runtime fuses sums and keeps features in blocked memory
    only where it knows all of them: 1.6 times faster on CSNet.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # Errors are raised, too.
    options.intra_op_num_threads = torch.get_num_threads()
    for value, shape in zip(onnx.load_model_from_string(file).graph.input if shapes else (), shapes, strict=True):
        for axis, length in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if axis.dim_param:
                options.add_free_dimension_override_by_name(axis.dim_param, length)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*arrays: np.ndarray) -> Any:
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def prepare_for_export(
    model: nn.Module, inputs: tuple[Tensor, ...], free: Free
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the model for inference on the CPU, and a batch of at least 2 inputs if its size is free."""
    if free != "none":
        # A batch size of 1 would be exported as a constant.
        inputs = tuple(torch.cat([value, value]) if len(value) < 2 else value for value in inputs)
    return eval_copy(model), inputs


def _input_names(model: nn.Module, count: int) -> list[str]:
    if count == 1:
        return ["image"]
    names = list(inspect.signature(model.forward).parameters)[:count]
    return names if len(names) == count else [f"input_{index}" for index in range(count)]


def _input_shape(file: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim]


def _name_axes(file: Any, axes: Sequence[Mapping[int, str]]) -> None:
    """Rename the free dimensions, which torch.onnx calls s40, s62, wherever they occur."""
    names: dict[str, str] = {}
    for value, own_axes in zip(file.graph.input, axes, strict=True):
        for axis, name in own_axes.items():
            symbol = value.type.tensor_type.shape.dim[axis].dim_param
            if symbol and symbol not in names:
                names[symbol] = f"{name}_{value.name}" if name in names.values() else name
    for graph in [file.graph, *file.functions]:
        values = [value for kind in ("input", "output", "value_info") for value in getattr(graph, kind)]
        for value in values:
            for dim in value.type.tensor_type.shape.dim if hasattr(value, "type") else ():
                if dim.dim_param:
                    dim.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)


@contextmanager
def silence(*loggers: str) -> Iterator[None]:
    """Let only errors through from these loggers ("" is the root), no warnings, and nothing to stderr."""
    levels = {log: log.level for log in map(logging.getLogger, loggers)}
    try:
        for log in levels:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
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
        root: BaseException = error  # torch.onnx wraps what went wrong in advice.
        while root.__cause__ is not None:
            root = root.__cause__
        reason = first_line(root)
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
