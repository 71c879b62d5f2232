"""Run the passes on a model. Apart from ``deploy``, so that the memory benchmark does not import the other runtimes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit.deployment.deployed_model import DeployConfig, DeployedModel
from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.passes.fold_norms import fold_norms
from prunekit.deployment.passes.merge_paths import merge_sums, share_pooling
from prunekit.deployment.passes.native_kernels import use_native_kernels
from prunekit.deployment.passes.pad_channels import pad_channels
from prunekit.deployment.passes.prelu_to_relu import prelu_to_relu
from prunekit.deployment.values import Inputs


@dataclass
class DeployRecord:
    """What :func:`prunekit.deployment.deploy.deploy` did to a model."""

    runtime: str
    fallback_reason: str | None = None  # why the model was left as it is
    config: DeployConfig = field(default_factory=DeployConfig)  # the options that were chosen
    candidates: list[dict[str, Any]] = field(default_factory=list)  # timed options, with ``median_ms`` for one input
    folded_norms: list[str] = field(default_factory=list)
    kept_norms: list[str] = field(default_factory=list)  # BatchNorms that could not be folded
    shared_pools: int = 0  # pooling and upsampling calls that reuse the result of another one
    padded_channels: int = 0
    padded_bytes: int = 0  # of the zeros that this adds to the weights
    merged_convs: int = 0
    rewritten_prelus: int = 0
    native_ops: int = 0  # calls of native kernels
    rejected: list[str] = field(default_factory=list)  # options that failed or changed the outputs, and why
    native_unavailable: str | None = None  # why the native kernels cannot be used, if they were wanted
    max_abs_diff: float = 0.0  # of the outputs, on the example and at a second size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rewrite(
    model: nn.Module, example: Inputs, config: DeployConfig, record: DeployRecord | None = None
) -> InferenceGraph:
    """Trace a model, run the passes of ``config``, and fill in ``record``; raise ExportError or NoKernels."""
    record = DeployRecord("") if record is None else record
    graph = InferenceGraph(model, example)
    record.folded_norms, record.kept_norms = fold_norms(graph)
    record.shared_pools = share_pooling(graph)
    if config.pad_multiple > 1:
        unpadded = _weight_bytes(graph)
        record.padded_channels = pad_channels(graph, config.pad_multiple)
        record.padded_bytes = _weight_bytes(graph) - unpadded
    if config.prelu_to_relu:
        record.rewritten_prelus = prelu_to_relu(graph)
    if config.merge_sums:
        record.merged_convs = merge_sums(graph)
    if config.native_kernels:
        record.native_ops = use_native_kernels(graph)
    return graph


def _weight_bytes(graph: InferenceGraph) -> int:
    return sum(parameter.nbytes for parameter in graph.module.parameters())


def build_deployed(graph: InferenceGraph, config: DeployConfig) -> DeployedModel:
    """The rewritten graph as a module, with the memory format of ``config``."""
    module = graph.recompile()
    if config.channels_last:
        for parameter in module.parameters():
            if parameter.dim() == 4:  # Module.to fails on the weights of 3d convolutions.
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return DeployedModel(module, config)
