"""A process that runs and times one model for ``bench.timing``, with lines of JSON on stdin and stdout."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.utils.text import one_line

MATRIX = 1024  # rows and columns of the matrices of the product

Call = Callable[[], Any]
# (batch, size, threads) → a call that runs the model once.
CallFactory = Callable[[int, int, int], Call]


def main() -> None:
    """Answer requests until stdin is closed."""
    # Libraries may print to stdout; the answers get a file descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("method"))(**request)
        except Exception as error:
            answer = {"error": one_line(f"{type(error).__name__}: {error}")[:300]}
        print(json.dumps(answer), file=answers, flush=True)


class _Worker:
    """The methods that a request can name."""

    make_call: CallFactory
    call: Call | None = None

    def load(self, runtime: str, path: str | None, precision: str) -> dict[str, Any]:
        """Import the runtime and read the model."""
        self.make_call = _RUNTIMES[runtime](path, precision == "bf16")
        resident = _memory_mb("VmRSS")
        return {"base_mb": _peak_mb() if resident is None else resident}

    def prepare(self, batch: int, size: int, threads: int) -> dict[str, Any]:
        """Get ready for inputs of one shape, with a first call that may compile; the second call is timed."""
        self.call = None
        with suppress(OSError):  # Resets the peak memory on Linux; elsewhere it stays that of all shapes so far.
            Path("/proc/self/clear_refs").write_text("5")
        self.call = self.make_call(batch, size, threads)
        self.call()
        start = time.perf_counter()
        self.call()
        return {"seconds": time.perf_counter() - start}

    def run_turn(self, calls: int) -> dict[str, Any]:
        """Time some calls, after one that wakes the threads and fills the caches."""
        self.call()
        milliseconds = []
        cpu_start, start = time.process_time(), time.perf_counter()
        for _ in range(calls):
            call_start = time.perf_counter()
            self.call()
            milliseconds.append(1000 * (time.perf_counter() - call_start))
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        return {"ms": milliseconds, "cores": cpu / wall, "peak_mb": _peak_mb()}


def _input(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)


def _torch(path: str, bf16: bool, compiled: bool = False) -> CallFactory:
    # Compiled code depends on the number of threads, which the cache ignores.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch

    from prunekit.deployment.bench.model_transfer import unpack_model

    dtype = torch.bfloat16 if bf16 else torch.float32
    model = unpack_model(Path(path)).to(dtype)

    def make_call(batch: int, size: int, threads: int) -> Call:
        torch.set_num_threads(threads)
        image = torch.from_numpy(_input(batch, size)).to(dtype)
        if not compiled:
            return torch.inference_mode()(lambda: model(image))
        torch._dynamo.reset()
        # Freezing the weights lays them out once, as the other runtimes do.
        frozen = torch.compile(model, dynamic=False, options={"freezing": True})
        return torch.no_grad()(lambda: frozen(image))

    return make_call


def _onnxruntime(path: str, bf16: bool) -> CallFactory:
    import onnxruntime

    session = partial(onnxruntime.InferenceSession, path, providers=["CPUExecutionProvider"])

    def make_call(batch: int, size: int, threads: int) -> Call:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Otherwise its threads spin while they wait, and take the cores of the next turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        axes = session(options).get_inputs()[0].shape
        for axis, length in zip(axes, (batch, 3, size, size), strict=True):
            if isinstance(axis, str):
                # Known sizes let it fuse sums and keep features in blocked memory.
                options.add_free_dimension_override_by_name(axis, length)
        image, fixed = _input(batch, size), session(options)
        return lambda: fixed.run(None, {"image": image})

    return make_call


def _openvino(path: str, bf16: bool) -> CallFactory:
    import openvino

    core = openvino.Core()

    def make_call(batch: int, size: int, threads: int) -> Call:
        model = core.read_model(path)
        # With fixed sizes it plans its memory: about 1.5 times faster on CSNet.
        model.reshape([batch, 3, size, size])
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        }
        request = core.compile_model(model, "CPU", options).create_infer_request()
        image = _input(batch, size)
        return lambda: request.infer([image])

    return make_call


def _matrix(path: str | None, bf16: bool) -> CallFactory:
    import torch

    def make_call(batch: int, size: int, threads: int) -> Call:
        torch.set_num_threads(threads)
        left, right = torch.randn(2, MATRIX, MATRIX)
        return lambda: torch.mm(left, right)

    return make_call


_RUNTIMES = {
    "torch": _torch,
    "compiled": partial(_torch, compiled=True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "matrix": _matrix,
}


def _memory_mb(key: str) -> float | None:
    """A value of /proc/self/status in MB of 10⁶ bytes; None where it does not exist."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 / 1e6 if match else None


def _peak_mb() -> float:
    peak = _memory_mb("VmHWM")
    if peak is not None:
        return peak
    # In bytes on macOS, in kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    main()
