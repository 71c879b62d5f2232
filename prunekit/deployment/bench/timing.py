"""Timing models beside each other: each in a process of its own, by turns, warm.

A process for each model keeps the runtimes' threads apart and makes its peak memory its own. The turns are short and go
round, forwards and backwards, so that whatever the machine does meanwhile meets all alike. A product of two float32
matrices takes its turn too: what the machine can compute at that hour.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import prunekit
from prunekit.deployment.bench.worker import MATRIX
from prunekit.errors import PrunekitError

Kind = Literal["torch", "compiled", "onnxruntime", "openvino", "matrix"]
TURN = 0.25  # seconds, about
LEAST = 3  # calls a turn
REST = 0.02  # seconds between turns: threads that wait by spinning fall asleep


@dataclass(frozen=True)
class BenchJob:
    """One model at one shape of input, (batch, 3, size, size), on so many threads.

    Attributes:
        name: for messages.
        kind: what runs it.
        path: its file (see :mod:`prunekit.deployment.bench.model_transfer`, or ``.onnx``, ``.xml``); none for the matrix
            product.
        precision: "float32" or "bf16".
    """

    name: str
    kind: Kind
    path: Path | None
    batch: int
    size: int
    threads: int
    precision: str = "float32"

    @property
    def process(self) -> tuple[Any, ...]:
        """Jobs that agree in this share a process."""
        return self.kind, self.path, self.precision


@dataclass
class Timing:
    """What was measured of a job.

    Attributes:
        milliseconds: of each call.
        peak_mb: the largest resident memory of a process that does nothing else, libraries included, in 10⁶ bytes.
        base_mb: what it held with its runtime imported and the model read, before the first call.
        cores: process time ÷ wall time; with t threads at work it is near t, and not above.
        error: why there is nothing.
    """

    milliseconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    base_mb: float = 0.0
    cores: float = 0.0
    error: str | None = None

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.milliseconds, q))

    @property
    def median(self) -> float:
        return self.percentile(50)


def measure(jobs: Sequence[BenchJob], seconds: float) -> tuple[list[Timing], dict[int, float]]:
    """Time jobs by turns: those of one shape and number of threads beside each other, one such set after the other.

    Args:
        seconds: of timed calls for each job, at least; every job has two turns or more.

    Returns:
        the timings, in the jobs' order; and for each number of threads the rate of a float32 matrix product (1024³),
        in GFLOP/s, timed in turns with the rest.
    """
    timings = [Timing() for _ in jobs]
    workers: dict[tuple[Any, ...], _Worker] = {}
    products: dict[int, list[float]] = {}
    # Small inputs first: where the system cannot forget a peak, the larger one is still told.
    shapes = sorted({(job.batch * job.size**2, job.batch, job.size, job.threads) for job in jobs})
    try:
        for _, batch, size, threads in shapes:
            shape = (batch, size, threads)
            matrix = BenchJob("matrix product", "matrix", None, *shape)
            product = Timing()
            chosen = [(j, t) for j, t in zip(jobs, timings, strict=True) if (j.batch, j.size, j.threads) == shape]
            _together([*chosen, (matrix, product)], workers, seconds)
            if product.error:
                raise PrunekitError(f"the matrix product cannot be timed: {product.error}")
            products.setdefault(threads, []).extend(product.milliseconds)
    finally:
        for worker in workers.values():
            worker.close()
    return timings, {t: 2 * MATRIX**3 / float(np.median(ms)) / 1e6 for t, ms in products.items()}


def _together(
    chosen: Sequence[tuple[BenchJob, Timing]], workers: dict[tuple[Any, ...], _Worker], seconds: float
) -> None:
    ready: list[tuple[BenchJob, Timing, _Worker, int]] = []
    for job, timing in chosen:
        if job.process not in workers:
            workers[job.process] = _Worker(job)
        worker = workers[job.process]
        try:
            took = worker.ask("prepare", batch=job.batch, size=job.size, threads=job.threads)["seconds"]
        except _Failed as error:
            timing.error = str(error)
            continue
        timing.base_mb = worker.base_mb
        ready.append((job, timing, worker, min(max(LEAST, math.ceil(TURN / max(took, 1e-6))), 1000)))
    spent = [0.0] * len(ready)
    rounds = 0
    while rounds < 2 or any(s < seconds for s in spent):
        places = range(len(ready)) if rounds % 2 == 0 else reversed(range(len(ready)))
        for place in places:
            _job, timing, worker, calls = ready[place]
            if timing.error:
                continue
            time.sleep(REST)
            try:
                found = worker.ask("turn", calls=calls)
            except _Failed as error:
                timing.error, spent[place] = str(error), math.inf
                continue
            timing.milliseconds += found["ms"]
            timing.peak_mb, timing.cores = max(timing.peak_mb, found["peak_mb"]), found["cores"]
            spent[place] += sum(found["ms"]) / 1000
        rounds += 1


class _Failed(Exception):
    """A worker could not do what it was asked."""


class _Worker:
    """A process of :mod:`prunekit.deployment.bench.worker` with its model."""

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
            found = self.ask("load", kind=job.kind, path=job.path and str(job.path), precision=job.precision)
            self.base_mb = found["base_mb"]
        except _Failed as error:
            # Told by whoever asks next.
            self._error = str(error)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if self._error:
            raise _Failed(self._error)
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise _Failed(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise _Failed(answer["error"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
