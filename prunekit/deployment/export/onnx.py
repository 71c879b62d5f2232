"""ONNX: one file that needs no prunekit, with dynamic height and width."""

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

from prunekit.deployment.export.onnx_writer import Unknown, emit
from prunekit.deployment.export.subnormals import flush_tensor, subnormal_count
from prunekit.deployment.export.validate import largest_difference
from prunekit.deployment.form import Deployed
from prunekit.deployment.graph import Graph
from prunekit.errors import ExportError

OPSET = 20


def export_onnx(model: nn.Module, example: Tensor, metadata: Mapping[str, str] | None = None) -> bytes:
    """The model as one ONNX file: input ``image``, output ``output``; the batch, height and width are free.

    No source path and no trace of this machine is left in the file, and no number in it is subnormal.

    Args:
        model: in float32; a copy of it is exported, in eval mode, on the CPU.
        example: an input: (N, C, H, W) float32, or (N, H, W, C) uint8 for a model that takes pictures.
        metadata: written into the file's ``metadata_props``.

    Raises:
        ExportError: an operation cannot be exported.
    """
    import onnx

    written = _written(model, example)
    if written is not None:
        return finalize(written, metadata or {})
    model, example = simplify_for_export(model, example)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    with add_metadata("ONNX", "onnx"), quiet(loggers), tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["output"],
            dynamic_shapes=(free_axes(example),),
            external_data=False,
            verbose=False,
        )
        path = Path(folder) / "model.onnx"
        program.save(str(path), external_data=False)
        file = onnx.load(str(path))
    return finalize(file, metadata or {})


def _written(model: nn.Module, example: Tensor) -> object | None:
    """A deployed model, operation by operation; None for any other, and where only torch.onnx can write it."""
    if not isinstance(model, Deployed) or not example.is_floating_point():
        return None
    try:
        return emit(Graph(model.network, example))
    except (Unknown, ExportError):
        return None


def check_onnx(file: bytes, model: nn.Module, inputs: Sequence[Tensor], name: str = "model.onnx") -> float:
    """The largest difference between the file in ONNX Runtime and the model in PyTorch, over these inputs; errors as
    for :func:`prunekit.deployment.export.validate.largest_difference`."""
    return largest_difference(name, onnx_function(file), model, inputs)


def onnx_function(file: bytes, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The file in ONNX Runtime on the CPU, as a function of an input.

    Args:
        threads: 0 for as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def free_axes(example: Tensor) -> dict[int, object]:
    """The axes of an input that are free: the batch and, of pictures, height and width."""
    places = {4: (0, 1, 2) if example.dtype == torch.uint8 else (0, 2, 3)}.get(example.dim(), (0,))
    return dict.fromkeys(places, torch.export.Dim.DYNAMIC)


def simplify_for_export(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the model and an input as exporters want them."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    example = example.detach().cpu()
    example = example.float() if example.is_floating_point() else example
    # A batch of one would be taken for a constant.
    return model, torch.cat([example, example]) if len(example) < 2 else example


@contextmanager
def quiet(loggers: Sequence[logging.Logger]) -> Iterator[None]:
    """Only errors from these loggers, and no warnings."""
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


@contextmanager
def add_metadata(title: str, key: str) -> Iterator[None]:
    """Whatever an exporter raises, as one line of ours."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"the model cannot be exported to {title}: {reason}; skip it with export.{key}=false"
        ) from error


def finalize(file: object, metadata: Mapping[str, str]) -> bytes:
    """An ONNX model as the bytes of a file: without what it tells of its making, without subnormal numbers, checked."""
    import onnx

    _strip(file)
    for key, value in metadata.items():
        file.metadata_props.add(key=key, value=value)
    for tensor in _tensors(file):
        values = onnx.numpy_helper.to_array(tensor)
        if subnormal_count(values):
            tensor.CopyFrom(onnx.numpy_helper.from_array(flush_tensor(values), tensor.name))
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString(deterministic=True)


def count_subnormals(file: bytes) -> int:
    """How many subnormal numbers an ONNX file holds."""
    import onnx

    return sum(subnormal_count(onnx.numpy_helper.to_array(tensor)) for tensor in _tensors(onnx.load_from_string(file)))


def _tensors(file: object) -> Iterator[object]:
    """Every tensor of numbers in a file, be it a weight or a constant."""
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
