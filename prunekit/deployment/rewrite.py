"""A model's graph rewritten into one form, and the record of what was done.

Apart from the choice of the form, because what is timed in a process of its own is written there, and must not carry
the runtimes that the choice needs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.deployment.form import Deployed, Form
from prunekit.deployment.graph import Graph
from prunekit.deployment.passes.fold_norms import fold_norms
from prunekit.deployment.passes.merge_paths import merge_inputs, merge_sums, share_poolings
from prunekit.deployment.passes.native_kernels import use_kernels
from prunekit.deployment.passes.pad_channels import pad_channels
from prunekit.deployment.passes.prelu_to_relu import relu_form


@dataclass
class Record:
    """What was done to a model.

    Attributes:
        runtime: for which it was written.
        reason: why the model stays as it is; None where it was rewritten.
        form: the one that was chosen.
        measured: each form that was tried, with the median of its milliseconds for one input like the example's first.
        folded, left: norms that went into convolutions, and those that stay.
        shared: poolings that are computed once, or from smaller ones.
        padded: channels that were added.
        merged: convolutions that went into others.
        relus: PReLUs that are written as ReLUs.
        kernels: how many operations kernels of our own took over, or why they cannot be had.
        max_abs_diff: of the outputs, on the example and at a second size.
    """

    runtime: str
    reason: str | None = None
    form: Form = field(default_factory=Form)
    measured: list[dict[str, Any]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    shared: int = 0
    padded: int = 0
    merged: int = 0
    relus: int = 0
    kernels: int | str = 0
    max_abs_diff: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rewrite(model: nn.Module, example: Tensor, form: Form, record: Record | None = None) -> Graph:
    """The graph of a model in one form; what was done is written into ``record``.

    Raises:
        ExportError: as for :class:`Graph`.
        NoKernels: the form wants kernels, and they cannot be had here.
    """
    record = Record("") if record is None else record
    graph = Graph(model, example)
    record.folded, record.left = fold_norms(graph)
    record.shared = share_poolings(graph)
    record.padded = pad_channels(graph, form.multiple) if form.multiple > 1 else 0
    record.relus = relu_form(graph) if form.relus else 0
    record.merged = (merge_sums(graph) if form.sums else 0) + (merge_inputs(graph) if form.inputs else 0)
    if form.kernels:
        record.kernels = use_kernels(graph)
    return graph


def written(graph: Graph, form: Form) -> Deployed:
    """What a rewritten graph computes, with its weights laid out as the form says."""
    module = graph.finish()
    return Deployed(module.to(memory_format=torch.channels_last) if form.channels_last else module, form)
