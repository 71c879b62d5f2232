"""Rewrite a trained model into an equivalent network that is faster at inference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.deployed_model import DeployConfig, DeployedModel
from prunekit.deployment.export.onnx import onnx_function
from prunekit.deployment.export.onnx_writer import graph_to_onnx
from prunekit.deployment.export.openvino import openvino_function
from prunekit.deployment.graph import InferenceGraph, UntraceableError
from prunekit.deployment.rewrite import DeployRecord, build_deployed, rewrite
from prunekit.deployment.values import Inputs, accepted, as_inputs, compute, difference, eval_copy, shape_text
from prunekit.errors import ExportError
from prunekit.native.library import NoKernels
from prunekit.utils.text import first_line

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
    # OpenVINO fuses sums and PReLUs and fills vectors itself; no other form is faster (benchmarks/README.md).
    "openvino": [DeployConfig()],
    # Not prelu_to_relu: a sum of two quantized terms costs accuracy.
    "int8": [DeployConfig()],
}


def deploy(
    model: nn.Module, example: Inputs, *, runtime: str = "torch", measure: bool = True
) -> tuple[nn.Module, DeployRecord]:
    """Rewrite a trained model for fast inference.

    BatchNorms are folded; for each runtime a few combinations of the other passes are timed, and the fastest is taken.
    A combination that fails, or changes the outputs by more than 1e-4 · max(1, max|output|), is left out.

    Args:
        model: is not changed. The deployed model is a copy in float32 on the CPU for inputs of any size.
        example: a batch of inputs, such as (N, C, H, W), of the size to optimize for; a tuple for several inputs.
        runtime: "torch", "pt2", "onnxruntime", "openvino", or "int8" for a model to be quantized.
        measure: time the options on this machine. Otherwise, or without the runtime, the default ones are used.

    Returns:
        the deployed model (a plain copy, if no combination is left) and the record of what was done; its
        ``fallback_reason`` says why the copy is plain, and ``rejected`` what was left out.

    Raises:
        ExportError: the runtime is unknown, or the model fails on the example.
    """
    if runtime not in CANDIDATES:
        raise ExportError(f"unknown runtime {runtime!r}; choose one of {', '.join(CANDIDATES)}")
    plain, inputs = eval_copy(model), as_inputs(example)
    expected = [(batch, compute(plain, batch)) for batch in _accepted(plain, inputs)]
    graphs: dict[DeployConfig, InferenceGraph] = {}
    records: dict[DeployConfig, DeployRecord] = {}
    rejected: list[str] = []
    native_unavailable = None
    for config in CANDIDATES[runtime]:
        record = records[config] = DeployRecord(runtime, config=config)
        try:
            graph = rewrite(plain, inputs, config, record)
            record.max_abs_diff = _check_outputs(build_deployed(graph, config), expected)
        except NoKernels as reason:
            native_unavailable = str(reason)
        except UntraceableError as error:
            rejected = [str(error)]
            break
        except Exception as error:  # A pass meets networks of any kind.
            rejected.append(f"{config.describe()}: {first_line(error)}")
        else:
            graphs[config] = graph
        if graphs and not measure:
            break
    if not graphs:
        return DeployedModel(plain, DeployConfig()), DeployRecord(runtime, fallback_reason=rejected[0])
    candidates, config = _fastest(graphs, inputs, runtime)
    deployed, record = build_deployed(graphs[config], config), records[config]
    record.candidates, record.native_unavailable, record.rejected = candidates, native_unavailable, rejected
    return deployed, record


def _fastest(
    graphs: dict[DeployConfig, InferenceGraph], inputs: tuple[Tensor, ...], runtime: str
) -> tuple[list[dict[str, Any]], DeployConfig]:
    """The time of each candidate, and the fastest one; the first one if fewer than two can be timed."""
    calls: dict[DeployConfig, Callable[[], Any]] = {}
    for config, graph in graphs.items() if len(graphs) > 1 else ():
        # The exporters and runtimes raise classes of their own; a runtime may not be installed.
        with suppress(Exception):
            calls[config] = _inference_call(runtime, graph, config, tuple(value[:1].contiguous() for value in inputs))
    if len(calls) < 2:
        return [], next(iter(graphs))
    times = dict(zip(calls, time_interleaved(list(calls.values()), ROUNDS), strict=True))
    rows = [{**asdict(config), "median_ms": round(ms, 3)} for config, ms in times.items()]
    return rows, min(times, key=times.__getitem__)


def time_interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
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
    runtime: str, graph: InferenceGraph, config: DeployConfig, inputs: tuple[Tensor, ...]
) -> Callable[[], Any]:
    if runtime in ("torch", "pt2"):
        module = build_deployed(graph, config)
        return lambda: module(*inputs)
    return file_call(runtime, graph_to_onnx(graph, fixed_size=True).SerializeToString(), inputs)


def file_call(runtime: str, file: bytes, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A call that runs an ONNX file on these inputs, as fast as the runtime can; it has run once."""
    start = onnx_function if runtime == "onnxruntime" else openvino_function
    run, arrays = start(file, shapes=[value.shape for value in inputs]), [value.numpy() for value in inputs]
    run(*arrays)
    return lambda: run(*arrays)


def _accepted(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The example, and a smaller odd size of it if the model takes that."""
    smaller = tuple(
        value[..., : value.shape[2] - 3, : value.shape[3] - 5] if value.dim() == 4 else value for value in inputs
    )
    if all(min(value.shape[2:], default=0) <= 8 for value in inputs if value.dim() == 4):
        return [inputs]
    return [inputs, *accepted(model, [smaller])]


def _check_outputs(deployed: nn.Module, expected: list[tuple[tuple[Tensor, ...], list[Tensor]]]) -> float:
    """The largest difference from the expected outputs; raises ExportError if it is too large."""
    largest = 0.0
    for inputs, outputs in expected:
        worst, close = difference(compute(deployed, inputs), outputs)
        if not close:
            raise ExportError(f"the outputs differ by {worst:.2g} on an input of {shape_text(inputs)}")
        largest = max(largest, worst)
    return largest
