"""A model handed to another process as data: its builder, its shape and its weights, in one safetensors file.

No pickle, which would be a program. And no run folder and plan, from which the receiver could shape the model itself:
that takes a trace of the dense model, and what tracing imports (a hundred MB) would stand in every peak that is
measured there. A slim model differs from what its builder makes by modules that are gone, by their counts of channels,
and by its tensors; these are written down, and put in place without looking at the graph.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunekit.backbones import build
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.form import Form
from prunekit.deployment.rewrite import rewrite, written
from prunekit.errors import CheckpointError
from prunekit.pruning.plan import Builder
from prunekit.runs.checkpoints import encode_tensors

COUNTS = (
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_parameters",
    "in_features",
    "out_features",
)
_KEY = "handed"


def pack_model(path: Path, model: nn.Module, builder: Builder, form: Form | None, shape: tuple[int, int, int]) -> None:
    """Write a model for another process of this machine.

    Args:
        model: what ``builder`` makes, in any shape that a plan gives it.
        form: the deployed form in which it is to be read; None for the model as it is.
        shape: of an input (C, H, W), for which that form is written.
    """
    told = {
        "builder": builder.model_dump(mode="json"),
        "modules": {name: _counts(module) for name, module in model.named_modules()},
        "form": form and asdict(form),
        "shape": list(shape),
    }
    tensors = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    path.write_bytes(encode_tensors(tensors, {_KEY: json.dumps(told)}))


def unpack_model(path: Path) -> nn.Module:
    """Read a model that was handed over: in eval mode, in float32 on the CPU, holding no subnormal number.

    Raises:
        CheckpointError: the file is none of ours, or speaks of modules that the builder does not make.
        PrunekitError: the builder fails, or the form cannot be written here.
    """
    try:
        with safe_open(path, framework="pt") as held:
            told = json.loads((held.metadata() or {})[_KEY])
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no model that was handed over ({error})") from error
    builder = Builder.model_validate(told["builder"])
    model = build(builder.name, builder.options, builder.file)
    _shape(model, told["modules"], tensors)
    model.eval().requires_grad_(False)
    if told["form"] is not None:
        form = Form(**told["form"])
        example = torch.randn(1, *told["shape"], generator=torch.Generator().manual_seed(0))
        model = written(rewrite(model, example, form), form)
    return without_subnormals(model)


def _counts(module: nn.Module) -> dict[str, int]:
    return {key: getattr(module, key) for key in COUNTS if isinstance(getattr(module, key, None), int)}


def _shape(model: nn.Module, modules: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Give the builder's model the modules, the counts and the tensors that were written down, in place."""
    for name in [name for name, _ in model.named_modules() if name not in modules]:
        above, _, key = name.rpartition(".")
        parent = _module(model, above)
        # Below a module that has gone there is nothing left.
        if parent is not None and key in parent._modules:
            del parent._modules[key]
    for name, counts in modules.items():
        module = _module(model, name)
        if module is None:
            raise CheckpointError(f"the builder makes no module {name!r}")
        for key in COUNTS:
            if key in counts:
                setattr(module, key, int(counts[key]))
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        module = _module(model, owner)
        if module is None:
            raise CheckpointError(f"the builder makes no tensor {name!r}")
        setattr(module, key, value if key in module._buffers else nn.Parameter(value, requires_grad=False))


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
