"""Export to ``.pt2``: a program that ``torch.export.load`` reads without prunekit."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.export.onnx import dynamic_axes, export_errors, prepare_for_export, silence
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.export.validate import max_abs_difference

# Read it with `torch.export.load(file, extra_files={METADATA: ""})`.
METADATA = "prunekit.json"
_SOURCE_KEYS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_pt2(model: nn.Module, example: Tensor, metadata: Mapping[str, str] | None = None) -> bytes:
    """Export a model to one ``.pt2`` file with dynamic sizes, as :func:`.onnx.export_onnx` does.

    The metadata becomes the extra file ``prunekit.json``. The program may reject images whose smallest feature has
    one pixel a side.
    """
    model, example = prepare_for_export(without_subnormals(model), example)
    with export_errors("pt2", "pt2"), silence("torch.export", "torch._export"):
        program = torch.export.export(model, (example,), dynamic_shapes=(dynamic_axes(example),))
        _strip(program)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(dict(metadata or {}))})
    return buffer.getvalue()


def check_pt2(file: bytes, model: nn.Module, inputs: Sequence[Tensor], name: str = "model.pt2") -> float:
    """Compare the file with the model; see :func:`.validate.max_abs_difference`."""
    program = torch.export.load(io.BytesIO(file)).module()

    def compute(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return program(torch.from_numpy(image)).numpy()

    return max_abs_difference(name, compute, model, inputs)


def _strip(program: torch.export.ExportedProgram) -> None:
    """Remove source paths and the example, which may be one of the user's images."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _SOURCE_KEYS:
                node.meta.pop(key, None)
    program._example_inputs = None
