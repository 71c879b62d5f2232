"""Budgets of time beside budgets of size, and the errors of predicted latencies: ``latency.py --budgets``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr

from prunekit.commands.bench import estimate_norm_statistics
from prunekit.config.recipe import load
from prunekit.deployment.bench.variants import random_variants
from prunekit.pipeline.latency import RunLatencies
from prunekit.pipeline.models import build_dense, input_shape
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.selection.cost_model import SizeModel
from prunekit.utils.progress import Reporter

FORMS = {"onnxruntime": "ort", "openvino": "openvino", "torch": "deployed"}
NO_TARGET = [f"target.{key}=null" for key in ("params", "params_ratio", "macs", "macs_ratio")]
UNSEEN = 30  # models that the prediction was not fitted to


def prediction_error(name: str, keys: Sequence[str]) -> tuple[str, int, float, float]:
    """Return the setting, the number of models that were measured, and the median relative error and the rank
    correlation of what is predicted from them for other models."""
    recipe = load(name, list(keys))
    network = estimate_norm_statistics(build_dense(recipe), input_shape(recipe))
    groups = find_groups(network, torch.zeros(1, *input_shape(recipe)))
    latencies = RunLatencies(recipe, network, groups, Reporter(Console(stderr=True)))
    table = latencies.table
    sizes = SizeModel(network, groups, tuple(table.size), table)
    others = random_variants(network, groups, UNSEEN + 1, seed=1)[1:]
    measured = np.array(latencies.timer.time(others))
    dead = [{group.id: group.channels - kept.get(group.id, group.channels) for group in groups} for kept in others]
    predicted = np.array([sizes.size_without(one).latency_ms for one in dead])
    rank = float(spearmanr(predicted, measured).statistic)
    return table.setting, len(table.variants), float(np.median(abs(predicted / measured - 1))), rank


def budgets(share: float, runtimes: Sequence[str]) -> dict[str, list[str]]:
    """The keys of each budget by its name."""
    found = {measure: [*NO_TARGET, f"target.{measure}_ratio={share}"] for measure in ("params", "macs")}
    time = [*NO_TARGET, f"target.latency_ratio={share}"]
    return found | {runtime: [*time, f"latency.runtime={runtime}"] for runtime in runtimes}


def run(name: str, keys: Sequence[str], out: Path, bench: Sequence[str]) -> dict[str, Any]:
    """Run a recipe and time its models, unless that is done; return the summary, with the milliseconds of each form."""
    summary = out / "summary.json"
    if not summary.is_file() or json.loads(summary.read_text())["status"] != "complete":
        prunekit("run", name, *keys, "--out", str(out), *(["--resume"] if out.exists() else []))
    if not (out / "bench.json").is_file():
        prunekit("bench", str(out), "--model", "dense,slim", *bench)
    rows = json.loads((out / "bench.json").read_text())["rows"]
    return json.loads(summary.read_text()) | {"ms": {(row["model"], row["form"]): row["median_ms"] for row in rows}}


def prunekit(*words: str) -> None:
    print(f"prunekit {shlex.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "prunekit.cli", *words], check=True, stdout=sys.stderr)


def compare_budgets(
    names: Sequence[str], runtimes: Sequence[str], share: float, keys: Sequence[str], bench: Sequence[str], runs: Path
) -> None:
    """Print a table of the errors of predictions, then one of the slim models of each budget.

    Args:
        names: of recipes.
        share: of the dense model's parameters, multiply-adds and milliseconds.
        keys: for all runs.
        bench: options of ``prunekit bench``.
        runs: folder of the runs; complete ones are not repeated.
    """
    errors = [["recipe", "runtime", "models", f"median error of {UNSEEN} others", "rank correlation"]]
    for name in names:
        for runtime in runtimes:
            setting, count, error, rank = prediction_error(name, [*keys, f"latency.runtime={runtime}"])
            errors.append([name, setting, str(count), f"{error:.1%}", f"{rank:.3f}"])
    print_table(errors)
    table = [["recipe", "budget", "params", "MACs", *runtimes, "metric, dense", "slim", "drift"]]
    forms = ["--forms", ",".join(FORMS[runtime] for runtime in runtimes)]
    for name in names:
        dense = None
        for budget, own in budgets(share, runtimes).items():
            given = [*keys, *own, "export.onnx=false", *(["baseline=true"] if dense is None else [])]
            try:
                result = run(name, given, runs / f"{name}-{budget}", [*forms, *bench])
            except subprocess.CalledProcessError:  # The command has said why.
                table.append([name, budget, "failed", *[""] * (len(runtimes) + 4)])
                continue
            metric = next(iter(result["slim"]["metrics"]))
            dense = dense or result["baseline"]["metrics"][metric]
            ms = result["ms"]
            ratios = [ms["slim", FORMS[runtime]] / ms["dense", FORMS[runtime]] for runtime in runtimes]
            kept = result["kept"]["params_ratio"], result["kept"]["macs_ratio"]
            numbers = [f"{value:.3f}" for value in (*kept, *ratios)]
            values = [f"{metric} {dense:.4f}", f"{result['slim']['metrics'][metric]:.4f}"]
            table.append([name, budget, *numbers, *values, f"{result['drift']['max_abs_diff']:.1e}"])
    print()
    print_table(table)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")
