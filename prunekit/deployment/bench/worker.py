"""A process that runs one model and times it, at the bidding of :mod:`prunekit.deployment.bench.timing`.

It imports the one runtime that it needs, so that its peak memory is what a program that does nothing else takes. It is
asked by lines of JSON, and answers each by one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MATRIX = 1024  # rows and columns of the matrices whose product is the measure of the machine
BF16 = "bf16"

Call = Callable[[], Any]
# (batch, size, threads) → a call that runs the model once.
Maker = Callable[[int, int, int], Call]


def main() -> None:
    """Answer requests until there are no more."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state = _State()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(state, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


class _State:
    def __init__(self) -> None:
        self.make: Maker | None = None
        self.call: Call | None = None

    def load(self, kind: str, path: str | None, precision: str) -> dict[str, Any]:
        """Import the runtime and read the model."""
        self.make = {"torch": _torch, "compiled": _compiled, "onnxruntime": _onnxruntime, "openvino": _openvino}.get(
            kind, _matrix
        )(path, precision)
        return {"base_mb": _resident()}

    def prepare(self, batch: int, size: int, threads: int) -> dict[str, Any]:
        """Make ready for inputs of one shape, and run twice: what is compiled at the first call is compiled."""
        self.call = None
        _forget_peak()
        self.call = self.make(batch, size, threads)
        self.call()
        began = time.perf_counter()
        self.call()
        return {"seconds": time.perf_counter() - began}

    def turn(self, calls: int) -> dict[str, Any]:
        """So many timed calls, behind one that wakes the threads and fetches the model into the caches."""
        self.call()
        took = []
        used = time.process_time()
        began = time.perf_counter()
        for _ in range(calls):
            start = time.perf_counter()
            self.call()
            took.append(1000 * (time.perf_counter() - start))
        wall = time.perf_counter() - began
        return {"ms": took, "cores": (time.process_time() - used) / wall, "peak_mb": _peak()}


def _input(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)


def _module(path: str) -> Any:
    from prunekit.deployment.bench.model_transfer import unpack_model

    return unpack_model(Path(path))


def _torch(path: str, precision: str) -> Maker:
    import torch

    dtype = torch.bfloat16 if precision == BF16 else torch.float32
    model = _module(path).to(dtype)

    def make(batch: int, size: int, threads: int) -> Call:
        torch.set_num_threads(threads)
        image = torch.from_numpy(_input(batch, size)).to(dtype)

        def call() -> Any:
            with torch.inference_mode():
                return model(image)

        return call

    return make


def _compiled(path: str, precision: str) -> Maker:
    # Compiled code holds the number of threads that it was made for, and the cache does not know it.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch

    model = _module(path)

    def make(batch: int, size: int, threads: int) -> Call:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        # With its weights frozen they are laid out once, as the runtimes do it.
        fast = torch.compile(model, dynamic=False, options={"freezing": True})
        image = torch.from_numpy(_input(batch, size))

        def call() -> Any:
            with torch.no_grad():
                return fast(image)

        return call

    return make


def _onnxruntime(path: str, precision: str) -> Maker:
    import onnxruntime

    def make(batch: int, size: int, threads: int) -> Call:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads wait by spinning, which would take the cores from whoever's turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        free = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).get_inputs()[0].shape
        for axis, length in zip(free, (batch, 3, size, size), strict=True):
            if isinstance(axis, str):
                # Known sizes let it fuse sums and keep features in blocks.
                options.add_free_dimension_override_by_name(axis, length)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        image = _input(batch, size)
        return lambda: session.run(None, {"image": image})

    return make


def _openvino(path: str, precision: str) -> Maker:
    import openvino

    core = openvino.Core()

    def make(batch: int, size: int, threads: int) -> Call:
        model = core.read_model(path)
        # Fixed sizes let it plan its memory: about 1.5 times faster on CSNet than the free ones of the file.
        model.reshape([batch, 3, size, size])
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": BF16 if precision == BF16 else "f32",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        image = _input(batch, size)
        return lambda: request.infer([image])

    return make


def _matrix(path: str | None, precision: str) -> Maker:
    import torch

    def make(batch: int, size: int, threads: int) -> Call:
        torch.set_num_threads(threads)
        left, right = torch.randn(2, MATRIX, MATRIX)
        return lambda: torch.mm(left, right)

    return make


# ---- memory, in MB of 10⁶ bytes


def _status(key: str) -> float | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def _resident() -> float:
    held = _status("VmRSS")
    return _peak() if held is None else held


def _peak() -> float:
    held = _status("VmHWM")
    if held is not None:
        return held
    # macOS counts bytes here, others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _forget_peak() -> None:
    """Let the peak begin anew, where the system can (Linux); elsewhere it is that of all shapes so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main()
