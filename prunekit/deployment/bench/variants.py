"""Measure the latencies of slim models of many shapes, to predict those of others from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.deployment.deploy import deploy, file_call
from prunekit.deployment.deployed_model import DeployConfig
from prunekit.deployment.export.onnx import export_onnx
from prunekit.deployment.export.onnx_writer import graph_to_onnx
from prunekit.deployment.rewrite import build_deployed, rewrite
from prunekit.deployment.values import as_inputs, eval_copy
from prunekit.errors import ExportError, PlanError
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.latency_model import LatencyTable, Variant
from prunekit.pruning.selection.selector import Selector
from prunekit.pruning.surgery.copies import clone
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.utils.compiled import unwrap
from prunekit.utils.environment import package_version, processor_name
from prunekit.utils.io import encode_json, sha256, write_atomic

RUNTIMES = ("onnxruntime", "openvino", "torch")
VARIANTS = 60
TOGETHER = 5  # variants at least that take turns with the dense model
MEMORY = 2e8  # parameters of all models that take turns
ROUNDS, CALLS = 6, 3
TURN = 0.01  # seconds at least of a model's calls in a round: the least of a few short ones is noise
TIMING = 1  # of the way of timing: raise it with a change that makes the times of kept tables others
LEAST, SPREAD = 0.1, 0.25  # of the share of channels that a variant keeps: the smallest mean, and the deviation
Progress = Callable[[float], None]  # called with the share that is done


class VariantTimer:
    """Times slim models of one dense model, each as it is deployed, in turns with the dense model.

    Args:
        model: the dense model; its weights do not matter.
        groups: its groups.
        example: a batch of images, (N, C, H, W), of the size to time; N is that of the timed calls.
        runtime: one of ``RUNTIMES``.
        threads: of the runtime; by default as many as PyTorch has.

    Raises:
        ExportError: the runtime is unknown or not installed, or the model cannot be deployed.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], example: Tensor, runtime: str, threads: int | None = None
    ):
        if runtime not in RUNTIMES:
            raise ExportError(f"unknown runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
        self.model, self.groups, self.runtime = unwrap(model), list(groups), runtime
        self.example, self.threads = as_inputs(example)[0], threads or torch.get_num_threads()
        self.free = [group for group in groups if group.reason is None]
        with self._threads():
            _, record = deploy(self.model, self._two_images(), runtime=runtime)
        if record.fallback_reason:
            raise ExportError(f"the model cannot be deployed: {record.fallback_reason}")
        self._config: DeployConfig = record.config
        self._dense = self._call({})
        self.dense_ms = 0.0

    def new_table(self) -> LatencyTable:
        """A table without measurements."""
        return LatencyTable(
            runtime=self.runtime,
            version=package_version(self.runtime) or "",
            device=f"{processor_name()}, {os.cpu_count()} cores",
            threads=self.threads,
            batch=len(self.example),
            size=list(self.example.shape[1:]),
        )

    def time(self, kept: Sequence[Mapping[str, int]], progress: Progress = lambda share: None) -> list[float]:
        """Return milliseconds of models that keep so many channels of each group.

        They take turns with the dense model, and are relative to it, so that a slower machine changes nothing.
        """
        ratios: list[float] = []
        dense: list[float] = []
        # The more take turns, the less what happens on the machine meanwhile changes their ratios.
        together = max(TOGETHER, int(MEMORY / sum(p.numel() for p in self.model.parameters())))
        for start in range(0, len(kept), together):
            calls = [self._dense]
            for number, one in enumerate(kept[start : start + together]):
                calls.append(self._call(one))
                progress((start + number / 2) / len(kept))
            built = (start + (len(calls) - 1) / 2) / len(kept)
            timed = (len(calls) - 1) / 2 / len(kept)
            with self._threads():
                times = _take_turns(calls, progress, built, timed)
            ratios += [ms / times[0] for ms in times[1:]]
            dense.append(times[0])
        self.dense_ms = self.dense_ms or min(dense)
        return [ratio * self.dense_ms for ratio in ratios]

    def onnx(self, kept: Mapping[str, int]) -> bytes:
        """The ONNX file of a variant, for inputs of the example's size."""
        graph = self._graph(kept)
        try:
            return graph_to_onnx(graph, fixed_size=True).SerializeToString()
        except Exception:  # torch.onnx supports more operations, and takes longer.
            return export_onnx(build_deployed(graph, self._config), self._two_images())

    def _graph(self, kept: Mapping[str, int]) -> Any:
        copied = clone(self.model)
        cutter = Cutter(copied, self.groups)
        dead = {g.id: set(range(kept.get(g.id, g.channels), g.channels)) for g in self.free}
        cutter.cut(copied, *cutter.complete(dead))
        return rewrite(eval_copy(copied), as_inputs(self._two_images()), self._config)

    def _call(self, kept: Mapping[str, int]) -> Callable[[], Any]:
        with self._threads():
            if self.runtime == "torch":
                module = build_deployed(self._graph(kept), self._config)
                return lambda: module(self.example)
            return file_call(self.runtime, self.onnx(kept), (self.example,))

    def _two_images(self) -> Tensor:
        """Where the batch is to be free, an example of more than one image."""
        return self.example if len(self.example) > 1 else torch.cat([self.example, self.example])

    @contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _take_turns(calls: Sequence[Callable[[], Any]], progress: Progress, done: float, share: float) -> list[float]:
    """The least milliseconds of each call, which other work on the machine disturbs least; ``share`` of the progress is
    made in it, beside what is ``done``."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for number in range(ROUNDS):
            progress(done + share * number / ROUNDS)
            for call, own in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()  # The caches hold the data of the call before.
                for _ in range(max(CALLS, round(TURN / (time.perf_counter() - start)))):
                    start = time.perf_counter()
                    call()
                    own.append(1e3 * (time.perf_counter() - start))
    return [min(own) for own in times]


def random_variants(model: nn.Module, groups: Sequence[Group], count: int, seed: int = 0) -> list[dict[str, int]]:
    """Return numbers of channels to keep: those of the dense model, then at random, from few to nearly all."""
    draw = np.random.default_rng(seed)
    scores = {group.id: draw.random(group.channels) for group in groups if group.reason is None}
    selector = Selector(unwrap(model), groups, scores)
    found = []
    for number in range(count):
        shares = draw.uniform(LEAST, 1) + draw.normal(0, SPREAD, len(selector.groups))
        shares = np.clip(shares, 0, 1) if number else np.ones(len(selector.groups))
        selection = selector.select_counts(np.round((1 - shares) * selector.widths).astype(int))
        found.append({group.id: group.channels - len(selection.dead[group.id]) for group in selector.groups})
    return found


def profile(
    model: nn.Module,
    example: Tensor,
    *,
    groups: Sequence[Group] | None = None,
    runtime: str = "onnxruntime",
    threads: int | None = None,
    variants: int = VARIANTS,
    progress: Progress = lambda share: None,
) -> LatencyTable:
    """Measure the latencies of slim models of many shapes on this machine, for budgets of time.

    Args:
        model: the dense model; its weights do not matter.
        example: a batch of images, (N, C, H, W), of the size to time; N is that of the timed calls.
        groups: of the model, if already known.
        runtime: "onnxruntime", "openvino" or "torch"; each model runs as ``deploy`` makes it.
        threads: of the runtime; by default as many as PyTorch has.
        variants: number of models; the error of the prediction falls with it.
        progress: called with the share that is done.

    Raises:
        ExportError: the runtime is unknown or not installed, or the model cannot be deployed.
        PlanError: nothing of the model can be pruned.
    """
    groups = find_groups(model, example) if groups is None else groups
    if not any(group.reason is None for group in groups):
        raise PlanError("no group of the model can be pruned, so its latency cannot change; see prunekit groups")
    timer = VariantTimer(model, groups, example, runtime, threads)
    table = timer.new_table()
    kept = random_variants(model, groups, variants)
    table.variants = [Variant(kept=k, ms=ms) for k, ms in zip(kept, timer.time(kept, progress), strict=True)]
    return table


def cached_table_path(folder: Path, table: LatencyTable, groups: Sequence[Group], network: str) -> Path:
    """Where the table of a model on this machine is kept: by all that its latencies depend on.

    ``network`` tells apart those of the same groups, such as two that differ in a pooling.
    """
    key = {**table.model_dump(exclude={"variants"}), "groups": [group.model_dump() for group in groups]}
    key |= {"network": network, "timing": TIMING}
    return folder / f"{sha256(json.dumps(key, sort_keys=True).encode())[:32]}.json"


def write_table(path: Path, table: LatencyTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode_json(table.to_json(), path.name))
