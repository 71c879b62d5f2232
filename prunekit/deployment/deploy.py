"""Rewrite a trained model into an equivalent network that is faster at inference."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.deployed_model import DeployConfig, DeployedModel
from prunekit.deployment.export.onnx import onnx_function
from prunekit.deployment.export.onnx_writer import UnsupportedOpError, graph_to_onnx
from prunekit.deployment.export.openvino import openvino_function
from prunekit.deployment.export.validate import TOLERANCE
from prunekit.deployment.graph import InferenceGraph
from prunekit.deployment.rewrite import DeployRecord, build_deployed, rewrite
from prunekit.errors import ExportError
from prunekit.native.library import NoKernels

ROUNDS = 7

_PYTORCH = [
    DeployConfig(pad_multiple=8, channels_last=True),
    DeployConfig(channels_last=True),
    DeployConfig(pad_multiple=8, merge_sums=True, channels_last=True),
    DeployConfig(merge_sums=True),
]
# Runtime → the options that are timed; the first are the default. "pt2" is PyTorch without native kernels, which cannot
# be exported or compiled.
CANDIDATES = {
    "torch": [*_PYTORCH, DeployConfig(pad_multiple=8, channels_last=True, native_kernels=True)],
    "pt2": _PYTORCH,
    "onnxruntime": [
        DeployConfig(pad_multiple=8, merge_sums=True, prelu_to_relu=True),
        DeployConfig(pad_multiple=8, prelu_to_relu=True),
        DeployConfig(pad_multiple=16, merge_sums=True, prelu_to_relu=True),
        DeployConfig(pad_multiple=8, merge_sums=True),
        DeployConfig(merge_sums=True),
    ],
    "openvino": [
        DeployConfig(),
        DeployConfig(merge_sums=True),
        DeployConfig(pad_multiple=8),
        DeployConfig(pad_multiple=8, merge_sums=True),
        DeployConfig(pad_multiple=16),
    ],
    # Not prelu_to_relu: a sum of two quantized terms costs accuracy.
    "int8": [DeployConfig()],
}


def deploy(
    model: nn.Module, example: Tensor, *, runtime: str = "torch", measure: bool = True
) -> tuple[nn.Module, DeployRecord]:
    """Rewrite a trained model for fast inference.

    BatchNorms are folded; for each runtime a few combinations of the other passes are timed, and the fastest is taken.

    Args:
        model: is not changed. The deployed model is a copy in float32 on the CPU for inputs of any size.
        example: a batch of inputs (N, C, H, W), of the size to optimize for.
        runtime: "torch", "pt2", "onnxruntime", "openvino", or "int8" for a model to be quantized.
        measure: time the options on this machine. Otherwise, or without the runtime, the default ones are used.

    Returns:
        the deployed model (a plain copy, if it cannot be traced) and the record of what was done.

    Raises:
        ExportError: the runtime is unknown, or the outputs differ by more than 1e-4 · max(1, max|output|).
    """
    if runtime not in CANDIDATES:
        raise ExportError(f"unknown runtime {runtime!r}; choose one of {', '.join(CANDIDATES)}")
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    example = example.detach().cpu().float()
    graphs: dict[DeployConfig, InferenceGraph] = {}
    records: dict[DeployConfig, DeployRecord] = {}
    native_unavailable = None
    for config in CANDIDATES[runtime][: None if measure else 1]:
        records[config] = DeployRecord(runtime, config=config)
        try:
            graphs[config] = rewrite(plain, example, config, records[config])
        except NoKernels as reason:
            native_unavailable = str(reason)
        except ExportError as error:
            return DeployedModel(plain, DeployConfig()), DeployRecord(runtime, fallback_reason=str(error))
    candidates, config = _fastest(graphs, example, runtime)
    deployed, record = build_deployed(graphs[config], config), records[config]
    record.candidates, record.native_unavailable = candidates, native_unavailable
    record.max_abs_diff = _check_outputs(plain, deployed, example)
    return deployed, record


def _fastest(
    graphs: dict[DeployConfig, InferenceGraph], example: Tensor, runtime: str
) -> tuple[list[dict[str, Any]], DeployConfig]:
    """The time of each candidate, and the fastest one; the first one if fewer than two can be timed."""
    calls: dict[DeployConfig, Callable[[], Any]] = {}
    for config, graph in graphs.items() if len(graphs) > 1 else ():
        call = _inference_call(runtime, graph, config, example[:1].contiguous())
        if call is not None:
            calls[config] = call
    if len(calls) < 2:
        return [], next(iter(graphs))
    times = dict(zip(calls, time_interleaved(list(calls.values())), strict=True))
    rows = [{**asdict(config), "median_ms": round(ms, 3)} for config, ms in times.items()]
    return rows, min(times, key=times.__getitem__)


def time_interleaved(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The median time of each call in milliseconds. The calls take turns; each turn starts with an untimed call."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for _ in range(rounds):
            for call, own_times in zip(calls, times, strict=True):
                call()  # The caches hold the data of the call before.
                for _ in range(2):
                    start = time.perf_counter()
                    call()
                    own_times.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(own_times)) for own_times in times]


def _inference_call(
    runtime: str, graph: InferenceGraph, config: DeployConfig, image: Tensor
) -> Callable[[], Any] | None:
    """A call that runs the graph on an image; None if the runtime is not installed or cannot run the graph."""
    if runtime in ("torch", "pt2"):
        module = build_deployed(graph, config)
        return lambda: module(image)
    array = image.numpy()
    try:
        file = graph_to_onnx(graph, fixed_size=True).SerializeToString()
        run = onnx_function(file) if runtime == "onnxruntime" else openvino_function(file)
    except (ExportError, UnsupportedOpError):
        return None
    return lambda: run(array)


def _check_outputs(model: nn.Module, deployed: nn.Module, example: Tensor) -> float:
    """The largest difference of the outputs, on the example and on an odd size if the model takes it."""
    inputs = [example]
    if example.dim() == 4 and min(example.shape[2:]) > 8:
        inputs.append(example[..., : example.shape[2] - 3, : example.shape[3] - 5])
    largest = 0.0
    for index, batch in enumerate(inputs):
        with torch.inference_mode():
            try:
                expected = model(batch)
            except Exception:
                if index:  # The model takes one size only.
                    continue
                raise
            difference = float((deployed(batch) - expected).abs().max())
        largest = max(largest, difference)
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ExportError(
                f"the deployed model differs by {difference:.2g} on an input of {tuple(batch.shape)}; "
                "export the plain model instead"
            )
    return largest
