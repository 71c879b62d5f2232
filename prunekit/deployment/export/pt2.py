"""Export to ``.pt2``: a program that ``torch.export.load`` reads without prunekit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from prunekit.deployment.export.axes import Free, dynamic_shapes, export_with_free_axes, free_axes
from prunekit.deployment.export.onnx import Metadata, export_errors, prepare_for_export, silence
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.export.validate import max_abs_difference
from prunekit.deployment.values import Inputs, as_inputs, compute

# Read it with `torch.export.load(file, extra_files={METADATA: ""})`.
METADATA = "prunekit.json"
_SOURCE_KEYS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_pt2(model: nn.Module, example: Inputs, metadata: Metadata | None = None) -> bytes:
    """Export a model to one ``.pt2`` file, with free sizes as :func:`.onnx.export_onnx` does.

    The metadata becomes the extra file ``prunekit.json``. The program may reject images whose smallest feature has
    one pixel a side.
    """
    compute(model, example)
    model = without_subnormals(model)
    shape, program = export_with_free_axes(
        lambda free: _export(model, example, free),
        lambda exported, inputs: max_abs_difference("model.pt2", _function(exported[1]), model, inputs),
        model,
        example,
    )
    said = metadata(shape) if callable(metadata) else metadata or {}
    with export_errors("pt2", "pt2"):
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(dict(said))})
    return buffer.getvalue()


def _export(model: nn.Module, example: Inputs, free: Free) -> tuple[list[str | int], torch.export.ExportedProgram]:
    """The shape of the first input, with names for free axes, and the program."""
    model, inputs = prepare_for_export(model, as_inputs(example), free)
    with export_errors("pt2", "pt2"), silence("torch.export", "torch._export"):
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes(model, inputs, free))
        _strip(program)
    return [free_axes(inputs[0], free).get(axis, length) for axis, length in enumerate(inputs[0].shape)], program


def check_pt2(file: bytes, model: nn.Module, inputs: Sequence[Inputs], name: str = "model.pt2") -> float:
    """Compare the file with the model; see :func:`.validate.max_abs_difference`."""
    return max_abs_difference(name, _function(torch.export.load(io.BytesIO(file))), model, inputs)


def _function(program: torch.export.ExportedProgram) -> Callable[..., list[np.ndarray]]:
    module = program.module()
    return lambda *arrays: [value.numpy() for value in compute(module, list(map(torch.from_numpy, arrays)))]


def _strip(program: torch.export.ExportedProgram) -> None:
    """Remove source paths and the example, which may be one of the user's images."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _SOURCE_KEYS:
                node.meta.pop(key, None)
    program._example_inputs = None
