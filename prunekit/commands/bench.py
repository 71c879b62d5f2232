"""``prunekit bench``: time a run's models in PyTorch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from prunekit.commands.results import open_to_write, simple_table, write_result
from prunekit.config.schema import Recipe
from prunekit.deployment.bench.model_transfer import pack_model
from prunekit.deployment.bench.timing import BenchJob, Timing, measure
from prunekit.deployment.deploy import deploy
from prunekit.deployment.export.onnx import export_onnx
from prunekit.deployment.export.openvino import import_openvino
from prunekit.deployment.export.quantize import quantize_onnx
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.values import UNTRAINED_TOLERANCE, tolerance
from prunekit.errors import ExportError, RecipeError
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import MODELS, build_dense, input_shape, load_model, newest_model, read_recipe
from prunekit.pruning.plan import Builder
from prunekit.pruning.surgery.recalibrate import recalibrate
from prunekit.runs.run_dir import RunDir
from prunekit.utils.environment import available_cores, processor_name
from prunekit.utils.progress import Reporter, format_duration
from prunekit.utils.text import one_line, plural, suggest

BENCH, FORMAT = "bench.json", 1
# Form → the runtime that runs it, the model or file it runs, the precision. What is compiled or computes in bf16 is
# deployed without native kernels ("pt2").
_FORMS = {
    "eager": ("torch", "eager", "float32"),
    "deployed": ("torch", "torch", "float32"),
    "compiled": ("compiled", "pt2", "float32"),
    "ort_plain": ("onnxruntime", "plain", "float32"),
    "ort": ("onnxruntime", "onnxruntime", "float32"),
    "openvino": ("openvino", "openvino", "float32"),
    "openvino_plain": ("openvino", "plain", "float32"),
    "deployed_bf16": ("torch", "pt2", "bf16"),
    "openvino_bf16": ("openvino", "openvino", "bf16"),
    "ort_int8": ("onnxruntime", "int8", "float32"),
    "openvino_int8": ("openvino", "int8", "float32"),
}
FORMS = tuple(_FORMS)[:6]  # the default
_SHAPE_KEYS = ("batch", "size", "threads")


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
    out: Path | None = None,
) -> dict[str, Any]:
    """Time a run's models in several forms, print tables, write ``bench.json`` and return its content.

    The dense model of a run without one (an imported slim model) is built from its recipe, untrained.

    Args:
        batches, sizes, threads: integers separated by commas; None for the recipe's size, and all cores.
        forms: keys of ``_FORMS``; None for :data:`FORMS`.
        models: of "baseline", "dense", "slim" and "finetuned"; None for "dense" and the slim or newest model.
        seconds: minimum total time of the timed calls of each row.
        out: folder for ``bench.json``; nothing is written into the run folder. None for the run folder.

    Raises:
        RecipeError: an argument is wrong.
        PrunekitError: the run folder cannot be used.
    """
    reporter = Reporter(console)
    batch_sizes = _parse_numbers("--batch", batches)
    thread_counts = _parse_numbers("--threads", threads or str(available_cores()))
    chosen_forms = _parse_names("--forms", forms, tuple(_FORMS)) if forms else list(FORMS)
    chosen_models = _parse_names("--model", models, MODELS) if models else None
    if not 0 < seconds < math.inf:
        raise RecipeError(f"--seconds {seconds:g}: must be above 0")
    with open_to_write(folder, out) as run, tempfile.TemporaryDirectory() as scratch:
        recipe = read_recipe(run)
        image_sizes = _parse_numbers("--size", sizes or str(recipe.data.size))
        networks = _load_models(run, recipe, chosen_models, reporter)
        chosen_forms = _available(chosen_forms, reporter)
        jobs: list[tuple[str, str, BenchJob]] = []
        for model, network in networks.items():
            if not console.is_interactive:
                reporter.info(f"preparing {model}")
            with reporter.spinner(f"preparing {model}"):
                trained = run.has(f"{model}/model.safetensors")
                with nullcontext() if trained else tolerance(UNTRAINED_TOLERANCE):
                    files = ModelFiles(model, network, recipe, Path(scratch), reporter).make(chosen_forms)
            jobs += [
                (model, form, BenchJob(f"{model} {form}", runtime, path, batch, size, n, precision))
                for form, (runtime, path, precision) in files.items()
                for batch in batch_sizes
                for size in image_sizes
                for n in thread_counts
            ]
        with closing(_TimingView(reporter, len(jobs))) as view:
            timings, products, stopped = measure([job for _, _, job in jobs], seconds, view.update)
        costs = {
            (model, size): total(count_modules(network, (3, size, size))[0])
            for model, network in networks.items()
            for size in image_sizes
        }
        rows = []
        for (model, form, job), timing in zip(jobs, timings, strict=True):
            if timing.error:
                reporter.info(f"skipped {job.name}, batch {job.batch}, {job.size}×{job.size}: {timing.error}")
            else:
                rows.append(_row(model, form, job, timing, costs[model, job.size], products[job.threads]))
        result = {
            "format": FORMAT,
            "device": processor_name(),
            "rows": rows,
            "matmul_gflops": {str(n): round(rate, 1) for n, rate in products.items()},
            "ratios": ratios(rows),
            "peak": "largest resident memory of a process of its own, libraries included, in 10⁶ bytes",
        }
        if stopped and not rows:
            raise KeyboardInterrupt
        write_result(run, out, BENCH, result)
        if out is None:
            _update_summary(run, rows, recipe.data.size)
    _print(result, networks, console)
    console.print(Text(f"saved to {(out or run.path) / BENCH}"), soft_wrap=True)
    if stopped:
        raise KeyboardInterrupt
    return result


class _TimingView:
    """How much is measured and the time left: a bar in a terminal, else a line for each tenth."""

    def __init__(self, reporter: Reporter, rows: int):
        self.reporter, self.rows = reporter, rows
        self.bar = None if not reporter.console.is_interactive else reporter.progress_bar("")
        self.start, self.tenths = time.monotonic(), 0
        self.update(0, 0.0)

    def update(self, done: int, share: float) -> None:
        text = f"timing: {done} of {plural(self.rows, 'row')} done"
        if self.bar is not None:
            self.bar.title = Text(text, "bold")
            self.bar(share, 1.0)
        elif not share or int(10 * share) > self.tenths:
            self.tenths = int(10 * share)
            left = (time.monotonic() - self.start) * (1 / share - 1) if share else None
            self.reporter.info(text if left is None else f"{text}, {share:.0%}, {format_duration(left)} left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class ModelFiles:
    """Write the files of one model that the timed processes read into a folder."""

    def __init__(self, name: str, network: nn.Module, recipe: Recipe, folder: Path, reporter: Reporter):
        self.name, self.network, self.recipe = name, network, recipe
        self.folder, self.reporter = folder, reporter
        self.example = torch.randn(2, *input_shape(recipe), generator=torch.Generator().manual_seed(0))

    def make(self, forms: Sequence[str]) -> dict[str, tuple[str, Path, str]]:
        """Return form → (runtime, file, precision). A form that fails is reported and left out."""
        files = {}
        for form in forms:
            runtime, source, precision = _FORMS[form]
            pytorch = runtime in ("torch", "compiled")
            path = self.folder / f"{self.name}-{source}{'.safetensors' if pytorch else '.onnx'}"
            try:
                if not path.exists() and pytorch:
                    self._pack(path, source)
                elif not path.exists():
                    path.write_bytes(self._export(source))
                files[form] = runtime, path, precision
            except (ExportError, OSError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                self.reporter.info(f"skipped {self.name} {form}: {one_line(error)}")
        return files

    def _pack(self, path: Path, source: str) -> None:
        record = None if source == "eager" else deploy(self.network, self.example, runtime=source)[1]
        config = None if record is None or record.fallback_reason else record.config
        builder = Builder(**self.recipe.backbone.model_dump(mode="json"))
        pack_model(path, self.network, builder, config, input_shape(self.recipe))

    def _export(self, source: str) -> bytes:
        model = self.network if source == "plain" else deploy(self.network, self.example, runtime=source)[0]
        file = export_onnx(model, self.example)
        if source != "int8":
            return file
        # Calibrated on noise, because only its time matters here.
        return quantize_onnx(file, [image[None].numpy() for image in self.example])


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each row with the dense row of the same form, batch, size and threads."""
    keys = ("form", *_SHAPE_KEYS)
    dense_rows = {tuple(row[key] for key in keys): row for row in rows if row["model"] == "dense"}
    out = []
    for row in rows:
        dense = dense_rows.get(tuple(row[key] for key in keys))
        if row["model"] == "dense" or dense is None:
            continue
        ratio = {
            f"{name}_ratio": row[key] / dense[key]
            for name, key in (("latency", "median_ms"), ("macs", "macs"), ("params", "params"))
        }
        out.append({"model": row["model"], **{key: row[key] for key in keys}, **ratio})
    return out


def estimate_norm_statistics(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Let the norms of an untrained model measure noise, so that its activations stay in range, and set eval mode.

    Args:
        model: on the CPU.
        shape: of an input: channels, height, width. A transformer takes no other.
    """
    recalibrate(model, [torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))])
    return model.eval()


def _load_models(run: RunDir, recipe: Recipe, names: Sequence[str] | None, reporter: Reporter) -> dict[str, nn.Module]:
    newest = newest_model(run)
    available = [name for name in MODELS if run.has(f"{name}/model.safetensors")]
    models = {}
    for name in names or dict.fromkeys(("dense", "slim" if "slim" in available else newest)):
        if name in available:
            model = load_model(run, name, recipe)
        elif name == "dense":
            reporter.info("dense: this run has no dense model; timing an untrained one, built from its recipe")
            model = estimate_norm_statistics(build_dense(recipe), input_shape(recipe))
        else:
            raise RecipeError(f"--model {name}: {run.path} has {', '.join(available)}")
        models[name] = without_subnormals(model).eval().requires_grad_(False)
    return models


def _available(forms: Sequence[str], reporter: Reporter) -> list[str]:
    """The forms whose tools are installed; the others are reported."""
    unavailable = []
    if any(form.startswith("openvino") for form in forms):
        try:
            import_openvino()
        except ExportError as error:
            reporter.info(f"skipped openvino: {error}")
            unavailable.append("openvino")
    if "compiled" in forms and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "c++")))):
        reporter.info("skipped compiled: torch.compile needs a C++ compiler, such as g++")
        unavailable.append("compiled")
    return [form for form in forms if not form.startswith(tuple(unavailable))]


def _row(model: str, form: str, job: BenchJob, timing: Timing, cost: dict[str, Any], gflops: float) -> dict[str, Any]:
    return {
        "model": model,
        "form": form,
        **{key: getattr(job, key) for key in _SHAPE_KEYS},
        "median_ms": round(timing.median, 4),
        "p10_ms": round(timing.percentile(10), 4),
        "p90_ms": round(timing.percentile(90), 4),
        "images_per_s": round(1000 * job.batch / timing.median, 2),
        "peak_mb": round(timing.peak_mb, 1),
        "base_mb": round(timing.base_mb, 1),
        "cores": round(timing.cores, 2),
        "calls": len(timing.milliseconds),
        "params": cost["params"],
        "macs": cost["macs"],
        "limit_ms": round(2 * cost["macs"] * job.batch / gflops / 1e6, 4),
    }


def _update_summary(run: RunDir, rows: Sequence[dict[str, Any]], size: int) -> None:
    """Add the latencies of the exported form, at the recipe's size, the smallest batch and number of threads."""
    export = run.read_json("summary.json").get("export")
    if not isinstance(export, dict) or "path" not in export:
        return
    form = {".onnx": "ort", ".xml": "openvino", ".pt2": "deployed"}.get(Path(export["path"]).suffix)
    latencies: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: (row["batch"], row["threads"])):
        if row["form"] == form and row["size"] == size:
            latencies.setdefault(row["model"], row["median_ms"])
    if latencies:
        run.update_summary("export", {**export, "latency_ms": latencies})


def _print(result: dict[str, Any], networks: dict[str, nn.Module], console: Console) -> None:
    rows = result["rows"]
    values = {key: sorted({row[key] for row in rows}) for key in _SHAPE_KEYS}
    columns = [key for key in _SHAPE_KEYS if len(values[key]) > 1]
    shared = [f"{key} {values[key][0]}" for key in _SHAPE_KEYS if len(values[key]) == 1]
    console.print(Text("; ".join(filter(None, [result["device"], ", ".join(shared)]))), soft_wrap=True)
    table = simple_table(["model", "form"], [*columns, "median ms", "p10", "p90", "images/s", "peak MB"])
    previous = None
    for row in rows:
        if previous not in (None, row["model"]):
            table.add_section()
        previous = row["model"]
        figures = (row[key] for key in ("median_ms", "p10_ms", "p90_ms", "images_per_s", "peak_mb"))
        cells = [f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}" for figure in figures]
        table.add_row(row["model"], row["form"], *(str(row[key]) for key in columns), *cells)
    console.print(table)
    if result["ratios"]:
        table = simple_table(["vs. dense", "form"], [*columns, "latency", "MACs", "params"])
        for row in result["ratios"]:
            figures = [f"{row[key]:.3f}" for key in ("latency_ratio", "macs_ratio", "params_ratio")]
            table.add_row(row["model"], row["form"], *(str(row[key]) for key in columns), *figures)
        console.print(table)
    for n, rate in result["matmul_gflops"].items():
        console.print(Text(f"float32 matrix product, threads {n}: {rate:.0f} GFLOP/s"), soft_wrap=True)
    for model in networks:
        own_rows = [row for row in rows if row["model"] == model]
        if own_rows:
            best = min(own_rows, key=lambda row: row["median_ms"] / row["limit_ms"])
            ratio = best["median_ms"] / best["limit_ms"]
            text = f"{model}: {best['form']} takes {ratio:.2f}× the time of its MACs at that rate"
            console.print(Text(f"{text} ({best['limit_ms']:.3g} ms)"), soft_wrap=True)


def _parse_numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"{option} {text}: must be integers above 0, separated by commas, such as 1,8")
    return sorted({int(part) for part in parts})


def _parse_names(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise RecipeError(f"{option} {name}: unknown{suggest(name, known)} choose from {', '.join(known)}")
    return list(dict.fromkeys(names))
