"""How fast a run's models are where they run: what ``prunekit bench`` does."""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from prunekit.config.registry import closest_match
from prunekit.config.schema import Recipe
from prunekit.deployment.bench.model_transfer import pack_model
from prunekit.deployment.bench.timing import BenchJob, Timing, measure
from prunekit.deployment.deploy import deploy
from prunekit.deployment.export.onnx import export_onnx
from prunekit.deployment.export.openvino import import_openvino
from prunekit.deployment.export.quantize import last_convolution, quantize_onnx
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.errors import ExportError, RecipeError
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import MODELS, build_dense, input_shape, load_model, newest_model, read_recipe
from prunekit.pruning.plan import Builder
from prunekit.runs.run_dir import RunDir
from prunekit.utils.progress import Reporter

BENCH, FORMAT = "bench.json", 1
FORMS = ("eager", "deployed", "compiled", "ort_plain", "ort", "openvino_plain", "openvino")
EXTRA = ("deployed_bf16", "openvino_bf16", "ort_int8", "openvino_int8")
# What lies within this of the ratio of multiply-adds counts as saved time.
SLACK = 0.15


def bench_run(
    folder: Path,
    console: Console,
    *,
    batches: str = "1",
    sizes: str | None = None,
    threads: str | None = None,
    forms: str | None = None,
    models: str | None = None,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Time a run's models in several forms, by turns, print a table and write ``bench.json``.

    The dense model of a run that has none (an imported slim one) is built from its recipe, untrained: time does not
    ask what the numbers are.

    Args:
        batches, sizes, threads: whole numbers, separated by commas; None: the recipe's size, and all cores.
        forms: of :data:`FORMS` and :data:`EXTRA`; None for the former.
        models: of "baseline", "dense", "slim" and "finetuned"; None for the first two.
        seconds: of timed calls for each row, at least.

    Returns:
        what ``bench.json`` holds.

    Raises:
        RecipeError: an argument is wrong.
        PrunekitError: the run folder cannot be used.
    """
    reporter = Reporter(console)
    counts = {"--batch": _numbers("--batch", batches), "--threads": _numbers("--threads", threads or str(_cores()))}
    chosen = _names("--forms", forms, (*FORMS, *EXTRA)) if forms else list(FORMS)
    named = _names("--model", models, MODELS) if models else None
    if not 0 < seconds < math.inf:
        raise RecipeError(f"--seconds {seconds:g}: give more than 0")
    with RunDir.open(folder, write=True) as run, tempfile.TemporaryDirectory() as scratch:
        recipe = read_recipe(run)
        counts["--size"] = _numbers("--size", sizes or str(recipe.data.size))
        networks = _networks(run, recipe, named, reporter)
        chosen = _possible(chosen, reporter)
        jobs: list[tuple[str, str, BenchJob]] = []
        for model, network in networks.items():
            with reporter.spinner(f"preparing {model}"):
                files = Files(model, network, recipe, Path(scratch), reporter).make(chosen)
            jobs += [
                (model, form, BenchJob(f"{model} {form}", kind, path, batch, size, n, precision))
                for form, (kind, path, precision) in files.items()
                for batch in counts["--batch"]
                for size in counts["--size"]
                for n in counts["--threads"]
            ]
        with reporter.spinner(f"timing {len(jobs)} rows"):
            timings, products = measure([job for _, _, job in jobs], seconds)
        macs = {
            (model, size): total(count_modules(network, (3, size, size))[0])
            for model, network in networks.items()
            for size in counts["--size"]
        }
        rows = []
        for (model, form, job), timing in zip(jobs, timings, strict=True):
            if timing.error:
                reporter.info(f"{job.name}, batch {job.batch}, {job.size}×{job.size}: left out: {timing.error}")
            else:
                rows.append(_row(model, form, job, timing, macs[model, job.size], products[job.threads]))
        found = {
            "format": FORMAT,
            "device": _device(),
            "rows": rows,
            "matmul_gflops": {str(n): round(rate, 1) for n, rate in products.items()},
            "ratios": ratios(rows),
            "peak": "largest resident memory of a process of its own, libraries included, in 10⁶ bytes",
        }
        run.write_json(BENCH, found)
        _into_summary(run, rows, recipe.data.size)
    _print(found, networks, console)
    console.print(Text(f"written: {folder / BENCH}"), soft_wrap=True)
    return found


class Files:
    """Files of one model for the timed processes.

    Args:
        name: the model's.
        folder: where they go.
    """

    def __init__(self, name: str, network: nn.Module, recipe: Recipe, folder: Path, reporter: Reporter):
        self.name, self.network, self.recipe = name, network, recipe
        self.folder, self.reporter = folder, reporter
        generator = torch.Generator().manual_seed(0)
        self.example = torch.randn(2, *input_shape(recipe), generator=generator)
        self.onnx: dict[str, bytes] = {}

    def make(self, forms: Sequence[str]) -> dict[str, tuple[str, Path, str]]:
        """Form → what runs it, its file, its precision; a form that cannot be made is said and left out."""
        out = {}
        for form in forms:
            try:
                out[form] = self._make(form)
            except (ExportError, OSError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                self.reporter.info(f"{self.name} {form}: left out: {reason}")
        return out

    def _make(self, form: str) -> tuple[str, Path, str]:
        precision = "bf16" if form.endswith("_bf16") else "float32"
        if form in ("eager", "deployed", "deployed_bf16", "compiled"):
            # What is compiled, or computes in bf16, is the deployed form without kernels of our own.
            which = {"eager": "eager", "deployed": "torch"}.get(form, "pt2")
            path = self.folder / f"{self.name}-{which}.safetensors"
            if not path.exists():
                record = None if which == "eager" else deploy(self.network, self.example, runtime=which)[1]
                form = None if record is None or record.reason else record.form
                pack_model(path, self.network, _builder(self.recipe), form, input_shape(self.recipe))
            return ("compiled" if form == "compiled" else "torch"), path, precision
        kind = "onnxruntime" if form.startswith("ort") else "openvino"
        which = "plain" if form.endswith("_plain") else "int8" if form.endswith("_int8") else kind
        path = self.folder / f"{self.name}-{which}.onnx"
        if not path.exists():
            path.write_bytes(self._quantised() if which == "int8" else self._exported(which))
        # OpenVINO reads ONNX as it is, and what it compiles is the same.
        return kind, path, precision

    def _exported(self, which: str) -> bytes:
        if which not in self.onnx:
            model = self.network if which == "plain" else deploy(self.network, self.example, runtime=which)[0]
            self.onnx[which] = export_onnx(model, self.example)
        return self.onnx[which]

    def _quantised(self) -> bytes:
        # For its time alone: what int8 costs in accuracy is told by `prunekit export --int8`, on data.
        batches = [image[None].numpy() for image in self.example]
        return quantize_onnx(self._exported("int8"), batches, exclude=last_convolution)


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each slim or fine-tuned row beside the dense one that was measured in the same way: latency, MACs and params as
    ratios, and whether the first is at most the second and 0.15."""
    way = ("form", "batch", "size", "threads")
    dense = {tuple(row[key] for key in way): row for row in rows if row["model"] == "dense"}
    out = []
    for row in rows:
        other = dense.get(tuple(row[key] for key in way))
        if row["model"] == "dense" or other is None:
            continue
        found = {key: row[key] / other[key] for key in ("median_ms", "macs", "params")}
        out.append(
            {
                "model": row["model"],
                **{key: row[key] for key in way},
                "latency_ratio": found["median_ms"],
                "macs_ratio": found["macs"],
                "params_ratio": found["params"],
                "within": found["median_ms"] <= found["macs"] + SLACK,
            }
        )
    return out


def settled(model: nn.Module) -> nn.Module:
    """An untrained model in eval mode whose norms have seen noise: without that its activations run out of range."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return model.eval()


def _networks(run: RunDir, recipe: Recipe, named: Sequence[str] | None, reporter: Reporter) -> dict[str, nn.Module]:
    newest = newest_model(run)
    there = [name for name in MODELS if run.has(f"{name}/model.safetensors")]
    wanted = list(named or dict.fromkeys(("dense", "slim" if "slim" in there else newest)))
    out = {}
    for name in wanted:
        if name in there:
            out[name] = load_model(run, name, recipe)
        elif name == "dense":
            reporter.info("dense: this run has none, so the recipe's is built, untrained")
            out[name] = settled(build_dense(recipe))
        else:
            raise RecipeError(f"--model {name}: {run.path} has {', '.join(there)}")
    return {name: without_subnormals(model).eval().requires_grad_(False) for name, model in out.items()}


def _possible(forms: Sequence[str], reporter: Reporter) -> list[str]:
    gone = {}
    if any(form.startswith("openvino") for form in forms):
        try:
            import_openvino()
        except ExportError as error:
            gone["openvino"] = str(error)
    if "compiled" in forms and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "c++")))):
        gone["compiled"] = "torch.compile needs a C++ compiler, such as g++"
    for reason in gone.values():
        reporter.info(f"left out: {reason}")
    return [form for form in forms if not form.startswith(tuple(gone) or ("\0",))]


def _row(model: str, form: str, job: BenchJob, timing: Timing, sizes: dict[str, Any], gflops: float) -> dict[str, Any]:
    return {
        "model": model,
        "form": form,
        "batch": job.batch,
        "size": job.size,
        "threads": job.threads,
        "median_ms": round(timing.median, 4),
        "p10_ms": round(timing.percentile(10), 4),
        "p90_ms": round(timing.percentile(90), 4),
        "images_per_s": round(1000 * job.batch / timing.median, 2),
        "peak_mb": round(timing.peak_mb, 1),
        "base_mb": round(timing.base_mb, 1),
        "cores": round(timing.cores, 2),
        "calls": len(timing.milliseconds),
        "params": sizes["params"],
        "macs": sizes["macs"],
        "limit_ms": round(2 * sizes["macs"] * job.batch / gflops / 1e6, 4),
    }


def _into_summary(run: RunDir, rows: Sequence[dict[str, Any]], size: int) -> None:
    """The latency of the exported file's form, at the recipe's size, the smallest batch and number of threads."""
    export = run.read_json("summary.json").get("export")
    if not isinstance(export, dict) or "path" not in export:
        return
    form = {".onnx": "ort", ".xml": "openvino", ".pt2": "deployed"}.get(Path(export["path"]).suffix)
    fitting = sorted((r for r in rows if r["form"] == form and r["size"] == size), key=_cost)
    took: dict[str, float] = {}
    for row in fitting:
        took.setdefault(row["model"], row["median_ms"])
    if took:
        run.update_summary("export", {**export, "latency_ms": took})


def _cost(row: dict[str, Any]) -> tuple[int, int]:
    return row["batch"], row["threads"]


def _print(found: dict[str, Any], networks: dict[str, nn.Module], console: Console) -> None:
    rows = found["rows"]
    one = {key: len({row[key] for row in rows}) == 1 for key in ("batch", "size", "threads")}
    keys = [key for key in one if not one[key]]
    same = ", ".join(f"{key} {rows[0][key]}" for key in one if one[key]) if rows else ""
    console.print(Text(f"{found['device']}{'; ' if same else ''}{same}"), soft_wrap=True)
    table = _table(["model", "form"], [*keys, "median ms", "p10", "p90", "images/s", "peak MB"])
    previous = None
    for row in rows:
        if previous not in (None, row["model"]):
            table.add_section()
        previous = row["model"]
        figures = [f"{row[key]:.3g}" for key in ("median_ms", "p10_ms", "p90_ms", "images_per_s")]
        table.add_row(row["model"], row["form"], *(str(row[key]) for key in keys), *figures, f"{row['peak_mb']:.0f}")
    console.print(table)
    if found["ratios"]:
        table = _table(["÷ dense", "form"], [*keys, "latency", "MACs", "params", "≤ MACs + 0.15"])
        for row in found["ratios"]:
            figures = [f"{row[key]:.3f}" for key in ("latency_ratio", "macs_ratio", "params_ratio")]
            table.add_row(
                row["model"], row["form"], *(str(row[key]) for key in keys), *figures, "yes" if row["within"] else "no"
            )
        console.print(table)
    for n, rate in found["matmul_gflops"].items():
        console.print(Text(f"float32 matrix product on {n} threads: {rate:.0f} GFLOP/s"), soft_wrap=True)
    for model in networks:
        mine = [row for row in rows if row["model"] == model]
        if mine:
            best = min(mine, key=lambda row: row["median_ms"] / row["limit_ms"])
            console.print(
                Text(
                    f"{model}: {best['form']} takes {best['median_ms'] / best['limit_ms']:.2f} times what its "
                    f"multiply-adds alone would ({best['limit_ms']:.3g} ms)"
                ),
                soft_wrap=True,
            )


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in left:
        table.add_column(title, no_wrap=True)
    for title in right:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"{option} {text}: give whole numbers above 0, separated by commas, such as 1,8")
    return list(np.unique([int(part) for part in parts]).tolist())


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            near = closest_match(name, list(known))
            mend = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
            raise RecipeError(f"{option} {name}: not known; {mend}")
    return list(dict.fromkeys(names))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "cpu"


def _builder(recipe: Recipe) -> Builder:
    return Builder(**recipe.backbone.model_dump(mode="json"))
