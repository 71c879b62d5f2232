"""Pass a model to another process as data: a safetensors file with its builder, channel counts and weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunekit.backbones import build
from prunekit.deployment.deployed_model import DeployConfig
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.rewrite import build_deployed, rewrite
from prunekit.errors import CheckpointError
from prunekit.pruning.plan import Builder
from prunekit.runs.checkpoint_store import encode_tensors

COUNTS = ("in_channels", "out_channels", "groups", "num_features", "num_parameters", "in_features", "out_features")
_KEY = "model_transfer"


def pack_model(
    path: Path, model: nn.Module, builder: Builder, config: DeployConfig | None, shape: tuple[int, int, int]
) -> None:
    """Write a model of ``builder``, dense or slim; with ``config``, to be deployed for ``shape`` (C, H, W)."""
    header = {
        "builder": builder.model_dump(mode="json"),
        "modules": {
            name: {key: getattr(module, key) for key in COUNTS if isinstance(getattr(module, key, None), int)}
            for name, module in model.named_modules()
        },
        "config": config and asdict(config),
        "shape": list(shape),
    }
    tensors = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    path.write_bytes(encode_tensors(tensors, {_KEY: json.dumps(header)}))


def unpack_model(path: Path) -> nn.Module:
    """Read a packed model: in eval mode, in float32, without subnormals. Raises CheckpointError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a packed model ({error}); write it with pack_model") from error
    builder = Builder.model_validate(header["builder"])
    model = build(builder.name, builder.options, builder.file)
    _restore(model, header["modules"], tensors)
    model.eval().requires_grad_(False)
    if header["config"] is not None:
        config = DeployConfig(**header["config"])
        example = torch.randn(1, *header["shape"], generator=torch.Generator().manual_seed(0))
        model = build_deployed(rewrite(model, example, config), config)
    return without_subnormals(model)


def _restore(model: nn.Module, modules: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Do what a plan does, without a trace, which imports 100 MB that would be measured as the model's memory."""
    dense = dict(model.named_modules())
    for name in dense.keys() - modules.keys():
        parent, _, key = name.rpartition(".")
        dense[parent]._modules.pop(key, None)
    present = dict(model.named_modules(remove_duplicate=False))
    for name, counts in modules.items():
        if name not in present:
            raise CheckpointError(f"the builder makes no module {name!r}")
        for key in counts.keys() & COUNTS:
            setattr(present[name], key, int(counts[key]))
    for name, value in tensors.items():
        module_name, _, key = name.rpartition(".")
        if module_name not in present:
            raise CheckpointError(f"the builder makes no tensor {name!r}")
        module = present[module_name]
        setattr(module, key, value if key in module._buffers else nn.Parameter(value, requires_grad=False))
