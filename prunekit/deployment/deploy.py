"""The deployed form: a second form of a trained model that computes the same and is fast where it runs.

What is fast differs between runtimes and machines, so the form is chosen by measuring: each candidate is made, timed
beside the others by turns, and the quickest stays. The record says what was done and what each candidate took.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.export.onnx import onnx_function
from prunekit.deployment.export.onnx_writer import Unknown, emit
from prunekit.deployment.export.validate import TOLERANCE
from prunekit.deployment.form import Deployed, Form
from prunekit.deployment.graph import Graph
from prunekit.deployment.rewrite import Record, rewrite, written
from prunekit.errors import ExportError
from prunekit.native.library import NoKernels

ROUNDS = 7

_PORTABLE = [
    Form(multiple=8, channels_last=True),
    Form(channels_last=True),
    Form(multiple=8, sums=True, channels_last=True),
    Form(multiple=8, inputs=True, channels_last=True),
    Form(sums=True),
]
# The first of each is taken where nothing can be measured. "pt2" is PyTorch, too, without what cannot be exported or
# compiled.
FORMS = {
    "torch": [*_PORTABLE, Form(multiple=8, channels_last=True, kernels=True)],
    "pt2": _PORTABLE,
    "onnxruntime": [
        Form(multiple=8, sums=True, relus=True),
        Form(multiple=8, relus=True),
        Form(multiple=16, sums=True, relus=True),
        Form(multiple=8, sums=True),
        Form(sums=True),
    ],
    "openvino": [
        Form(),
        Form(sums=True),
        Form(multiple=8),
        Form(multiple=8, sums=True),
        Form(multiple=16),
    ],
    # A PReLU stays one: as a sum of two quantised parts it costs accuracy.
    "int8": [Form()],
}


def deploy(
    model: nn.Module, example: Tensor, *, runtime: str = "torch", measure: bool = True
) -> tuple[nn.Module, Record]:
    """A trained model in the form that is fastest where it will run.

    Args:
        model: is left as it is; its copy is in float32 on the CPU, and takes inputs of every size that the model takes.
        example: a batch of inputs (N, C, H, W), of the size that is to be fast.
        runtime: "torch", "pt2", "onnxruntime", "openvino" or "int8": what will run it, the file that it is exported to,
            or that it is to be quantised.
        measure: whether to choose by timing on this machine. If not, or where the runtime is not installed, the form
            is the one that is known to do well: the same on every machine.

    Returns:
        the deployed model, and the record of what was done. A model that cannot be followed comes back as it is, and
        ``record.reason`` says why.

    Raises:
        ExportError: an unknown runtime, or the deployed model differs from the model by more than
            1e-4 · max(1, max|output|).
    """
    if runtime not in FORMS:
        raise ExportError(f"no form for the runtime {runtime!r}; there are {', '.join(FORMS)}")
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    example = example.detach().cpu().float()
    made: dict[Form, tuple[Graph, Record]] = {}
    without_kernels = None
    for form in FORMS[runtime][: None if measure else 1]:
        record = Record(runtime, form=form)
        try:
            made[form] = rewrite(plain, example, form, record), record
        except NoKernels as why:
            without_kernels = str(why)
        except ExportError as error:
            return Deployed(plain, Form()), Record(runtime, reason=str(error))
    measured, form = [], FORMS[runtime][0]
    if measure:
        measured, form = _quickest({one: graph for one, (graph, _) in made.items()}, example, runtime)
    graph, record = made[form]
    record.measured = measured
    record.kernels = without_kernels or record.kernels
    deployed = written(graph, form)
    record.max_abs_diff = _difference(plain, deployed, example)
    return deployed, record


def _quickest(made: dict[Form, Graph], example: Tensor, runtime: str) -> tuple[list[dict[str, Any]], Form]:
    """What each form takes, and the form that takes least; the first of them where nothing could be timed."""
    if len(made) < 2:
        return [], next(iter(made))
    image = example[:1].contiguous()
    calls: dict[Form, Callable[[], Any]] = {}
    for form, graph in made.items():
        call = _CALLS[runtime](graph, form, image)
        if call is not None:
            calls[form] = call
    if len(calls) < 2:
        return [], next(iter(made))
    taken = by_turns(list(calls.values()))
    rows = [{**asdict(form), "median_ms": round(ms, 3)} for form, ms in zip(calls, taken, strict=True)]
    return rows, min(zip(taken, calls, strict=True), key=lambda pair: pair[0])[1]


def by_turns(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The median of each call's milliseconds; all take turns, and each is called once unmeasured before its turn, since
    the one before has filled the caches with its own."""
    taken: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for _ in range(rounds):
            for call, times in zip(calls, taken, strict=True):
                call()
                for _ in range(2):
                    began = time.perf_counter()
                    call()
                    times.append(1e3 * (time.perf_counter() - began))
    return [float(np.median(times)) for times in taken]


def _in_torch(graph: Graph, form: Form, image: Tensor) -> Callable[[], Any]:
    module = written(graph, form)
    return lambda: module(image)


def _in_onnxruntime(graph: Graph, form: Form, image: Tensor) -> Callable[[], Any] | None:
    try:
        file = emit(graph, fixed=True).SerializeToString()
    except Unknown:
        return None
    run, array = onnx_function(file), image.numpy()
    return lambda: run(array)


def _in_openvino(graph: Graph, form: Form, image: Tensor) -> Callable[[], Any] | None:
    try:
        import openvino

        file = emit(graph, fixed=True).SerializeToString()
    except (ImportError, Unknown):
        return None
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(file), "CPU", hints).create_infer_request()
    return lambda: request.infer([image.numpy()])


_CALLS = {"torch": _in_torch, "pt2": _in_torch, "onnxruntime": _in_onnxruntime, "openvino": _in_openvino}


def _difference(model: nn.Module, deployed: nn.Module, example: Tensor) -> float:
    """The largest difference, on the example and on a part of it whose sides are odd where the model takes them."""
    worst = 0.0
    inputs = [example]
    if example.dim() == 4 and min(example.shape[2:]) > 8:
        inputs.append(example[..., : example.shape[2] - 3, : example.shape[3] - 5])
    for number, batch in enumerate(inputs):
        with torch.inference_mode():
            try:
                wanted = model(batch)
            except Exception:
                if number:  # A model of one size.
                    continue
                raise
            gap = float((deployed(batch) - wanted).abs().max())
        worst = max(worst, gap)
        if not gap <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise ExportError(
                f"the deployed form differs from the model by {gap:.2g} on an input of {tuple(batch.shape)}; "
                "export the plain model instead"
            )
    return worst
