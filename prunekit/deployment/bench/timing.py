"""Time models side by side: each in its own process, in short turns."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import prunekit
from prunekit.deployment.bench.worker import MATRIX
from prunekit.errors import PrunekitError

Runtime = Literal["torch", "compiled", "onnxruntime", "openvino", "matrix"]
TURN = 0.25  # seconds, approximately
MIN_CALLS, MAX_CALLS = 3, 1000  # in a turn
REST = 0.02  # seconds between turns, until spinning threads sleep


@dataclass(frozen=True)
class BenchJob:
    """One model with inputs (batch, 3, size, size) on a number of threads."""

    name: str
    runtime: Runtime
    path: Path | None  # ``.onnx``, ``.xml``, or of ``bench.model_transfer``; None for the matrix product
    batch: int
    size: int
    threads: int
    precision: str = "float32"  # or "bf16"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.size, self.threads


@dataclass
class Timing:
    """Measurements of a job; memory is in 10⁶ bytes."""

    milliseconds: list[float] = field(default_factory=list)  # of each call
    peak_mb: float = 0.0  # peak resident memory of the process, libraries included
    base_mb: float = 0.0  # resident memory before the first call, with the runtime imported and the model read
    cores: float = 0.0  # process time ÷ wall time; at most the number of threads
    error: str | None = None  # why there are no measurements

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.milliseconds, q))

    @property
    def median(self) -> float:
        return self.percentile(50)


class Measurements(NamedTuple):
    timings: list[Timing]  # of each job
    gflops: dict[int, float]  # number of threads → of a float32 1024³ matrix product, timed in turns with the jobs
    stopped: bool = False  # by Ctrl-C or SIGTERM; what was not measured has an error


def measure(
    jobs: Sequence[BenchJob], seconds: float, progress: Callable[[int, float], None] = lambda done, share: None
) -> Measurements:
    """Time jobs: each for at least ``seconds`` and two turns. Those with the same shape and threads take turns.

    Args:
        progress: called after each round of turns with the number of jobs done and the share of the measurements done.
    """
    timings = [Timing() for _ in jobs]
    workers: dict[tuple[Any, ...], _Worker] = {}
    products: dict[int, list[float]] = {}
    stopped = False

    def report() -> None:
        shares = [1.0 if t.error else min(1.0, sum(t.milliseconds) / 1000 / seconds) for t in timings]
        progress(sum(share >= 1 for share in shares), sum(shares) / len(shares))

    # Small inputs first: where the system cannot reset a peak, the peak of larger ones is still right.
    shapes = sorted({job.shape for job in jobs}, key=lambda shape: (shape[0] * shape[1] ** 2, *shape))
    try:
        for shape in shapes:
            product = Timing()
            turns = [(job, timing) for job, timing in zip(jobs, timings, strict=True) if job.shape == shape]
            turns.append((BenchJob("matrix product", "matrix", None, *shape), product))
            try:
                _take_turns(turns, workers, seconds, report)
            finally:
                products.setdefault(shape[2], []).extend(product.milliseconds)
            if product.error:
                raise PrunekitError(f"the matrix product cannot be timed: {product.error}")
    except KeyboardInterrupt:
        stopped = True
    finally:
        for worker in workers.values():
            worker.close()
    gflops = {t: 2 * MATRIX**3 / float(np.median(ms)) / 1e6 for t, ms in products.items() if ms}
    for job, timing in zip(jobs, timings, strict=True):
        if not timing.error and not (timing.milliseconds and job.threads in gflops):
            timing.error = "not measured"
    return Measurements(timings, gflops, stopped)


def _take_turns(
    jobs: Sequence[tuple[BenchJob, Timing]],
    workers: dict[tuple[Any, ...], _Worker],
    seconds: float,
    report: Callable[[], None],
) -> None:
    ready: list[tuple[Timing, _Worker, int]] = []
    for job, timing in jobs:
        key = job.runtime, job.path, job.precision
        worker = workers[key] = workers.get(key) or _Worker(job)
        try:
            took = worker.request("prepare", batch=job.batch, size=job.size, threads=job.threads)["seconds"]
        except _WorkerError as error:
            timing.error = str(error)
            continue
        timing.base_mb = worker.base_mb
        ready.append((timing, worker, min(max(MIN_CALLS, math.ceil(TURN / max(took, 1e-6))), MAX_CALLS)))
    rounds = 0
    while rounds < 2 or any(not timing.error and sum(timing.milliseconds) < 1000 * seconds for timing, *_ in ready):
        for timing, worker, calls in ready if rounds % 2 == 0 else reversed(ready):
            if timing.error:
                continue
            time.sleep(REST)
            try:
                result = worker.request("run_turn", calls=calls)
            except _WorkerError as error:
                timing.error = str(error)
                continue
            timing.milliseconds += result["ms"]
            timing.peak_mb, timing.cores = max(timing.peak_mb, result["peak_mb"]), result["cores"]
        rounds += 1
        report()


class _WorkerError(Exception):
    """A worker could not answer a request."""


class _Worker:
    def __init__(self, job: BenchJob):
        # The package may be imported from a folder that is not installed.
        paths = [str(Path(prunekit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prunekit.deployment.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self.base_mb = 0.0
        self._error: str | None = None
        try:
            path = job.path and str(job.path)
            self.base_mb = self.request("load", runtime=job.runtime, path=path, precision=job.precision)["base_mb"]
        except _WorkerError as error:
            self._error = str(error)  # Raised by the next request.

    def request(self, method: str, **arguments: Any) -> dict[str, Any]:
        if self._error:
            raise _WorkerError(self._error)
        try:
            self._process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise _WorkerError(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise _WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
