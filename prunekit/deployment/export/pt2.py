"""``.pt2``: the model as a program of PyTorch's own, which ``torch.export.load`` reads without prunekit."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.deployment.export.onnx import add_metadata, free_axes, quiet, simplify_for_export
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.export.validate import largest_difference

# The name under which `torch.export.load(..., extra_files={METADATA: ""})` gives what the file says of itself.
METADATA = "prunekit.json"
# What the exporter notes of each operation's source; a path among it.
_SOURCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_pt2(model: nn.Module, example: Tensor, metadata: Mapping[str, str] | None = None) -> bytes:
    """The model as one ``.pt2`` file whose batch, height and width are free.

    Small sizes may be refused: the program is that of images whose smallest feature has more than one pixel a side.
    No source path is left in the file, and no number in it is subnormal.

    Args:
        model, example: as for :func:`prunekit.deployment.export.onnx.export_onnx`.
        metadata: written into the file's extra file ``prunekit.json``.

    Raises:
        ExportError: an operation cannot be exported.
    """
    model, example = simplify_for_export(without_subnormals(model), example)
    with add_metadata("pt2", "pt2"), quiet([logging.getLogger("torch.export"), logging.getLogger("torch._export")]):
        program = torch.export.export(model, (example,), dynamic_shapes=(free_axes(example),))
        _strip(program)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(dict(metadata or {}))})
    return buffer.getvalue()


def check_pt2(file: bytes, model: nn.Module, inputs: Sequence[Tensor], name: str = "model.pt2") -> float:
    """The largest difference between the file and the model, over these inputs; errors as for
    :func:`prunekit.deployment.export.validate.largest_difference`."""
    program = torch.export.load(io.BytesIO(file)).module()

    def compute(image):
        with torch.inference_mode():
            return program(torch.from_numpy(image)).numpy()

    return largest_difference(name, compute, model, inputs)


def _strip(program: torch.export.ExportedProgram) -> None:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _SOURCE:
                node.meta.pop(key, None)
    # The example would stand in the file: a picture of the user's, maybe.
    program._example_inputs = None
