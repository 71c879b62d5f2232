"""Latency of deployed models, as ratios of times that are measured in turns.

    python benchmarks/latency.py runs/l-x2                     # any run folder; nothing is written to it
    python benchmarks/latency.py                               # a CSNet ×2 with random odd splits
    python benchmarks/latency.py --width 10 --size 32 --seconds 0.05 --forms eager,deployed    # a quick check
    python benchmarks/latency.py --budgets csnet --size 224 --threads 1 --set slim.importance=ablation decay.name=none

With --budgets: recipes pruned to half of the parameters, of the multiply-adds and of the milliseconds in each runtime,
and the errors of the predicted latencies; a few minutes for each run.

The limit is the time of the arithmetic alone: 2 × paper FLOPs (or 2 × MACs) ÷ the rate of a 1024³ float32 matrix
product on as many threads, timed in turns with the models. Subnormal weights are set to zero.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from latency_budgets import compare_budgets
from rich.console import Console
from torch import nn

from prunekit.backbones.csnet import csnet
from prunekit.commands.bench import FORMS, ModelFiles, estimate_norm_statistics
from prunekit.config.schema import Recipe
from prunekit.deployment.bench.timing import BenchJob, measure
from prunekit.deployment.bench.variants import RUNTIMES
from prunekit.deployment.export.subnormals import without_subnormals
from prunekit.deployment.values import UNTRAINED_TOLERANCE, tolerance
from prunekit.flops import count_modules, total
from prunekit.pipeline.models import build_dense, input_shape, load_model, newest_model, read_recipe
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.surgery.plan_builder import make_plan
from prunekit.pruning.surgery.slim import slim
from prunekit.runs.run_dir import RunDir
from prunekit.utils.progress import Reporter

PAIRS = (("deployed", "eager"), ("compiled", "eager"), ("ort", "ort_plain"), ("openvino", "openvino_plain"))


def random_slim(width: int, size: int, share: float, seed: int = 0) -> tuple[Recipe, dict[str, nn.Module]]:
    """A recipe, and two models: a dense CSNet, and the same without a random share of its channels."""
    recipe = Recipe.model_validate(
        {
            "name": f"random-x{width}",
            "backbone": {"name": "csnet", "options": {"width": width}},
            "data": {"name": "salient_shapes", "size": size},
            "train": {"epochs": 0},
            "finetune": {"epochs": 0},
        }
    )
    torch.manual_seed(seed)
    dense = estimate_norm_statistics(csnet(width=width), (3, 64, 64))
    generator = torch.Generator().manual_seed(seed)
    groups = find_groups(dense, torch.zeros(1, 3, 64, 64))
    dead = {}
    for group in groups:
        if group.reason is None:
            count_dead = int(torch.randint(round(2 * share * group.channels) + 1, (), generator=generator))
            order = torch.randperm(group.channels, generator=generator)
            dead[group.id] = order[: min(count_dead, group.channels - 1)].sort().values.tolist()
            with torch.no_grad():
                for gate in group.gates:
                    dense.get_submodule(gate.norm).weight[gate.slice[0] : gate.slice[1]][dead[group.id]] = 0
    small, _ = slim(
        dense, make_plan(dense, groups, dead), torch.randn(2, 3, 64, 64, generator=generator), groups=groups
    )
    return recipe, {"dense": dense, "slim": small}


def load_models(folder: Path) -> tuple[Recipe, dict[str, nn.Module]]:
    """A run's recipe, its dense model (untrained if it has none) and its newest model."""
    run = RunDir.open(folder)
    recipe, name = read_recipe(run), newest_model(run)
    if run.has("dense/model.safetensors"):
        dense = load_model(run, "dense", recipe)
    else:
        dense = estimate_norm_statistics(build_dense(recipe), input_shape(recipe))
    return recipe, {"dense": dense} if name == "dense" else {"dense": dense, "slim": load_model(run, name, recipe)}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.5, help="mean share of channels to prune")
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    forms = [form for form in FORMS if form != "compiled"]
    parser.add_argument("--forms", default=",".join([*forms, "openvino_plain"]))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--budgets", nargs="+", metavar="RECIPE", help="compare budgets of recipes")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"], choices=list(RUNTIMES))
    parser.add_argument("--kept", type=float, default=0.5, help="share that the budgets keep")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipes")
    parser.add_argument("--runs", type=Path, default=Path("runs/latency"), metavar="DIR")
    args = parser.parse_args(arguments)
    if args.budgets:
        keys = [*args.set, f"latency.threads={args.threads}", *([f"latency.size={args.size}"] if args.size else [])]
        bench = ["--threads", str(args.threads), *(["--size", str(args.size)] if args.size else [])]
        compare_budgets(args.budgets, args.runtimes, args.kept, keys, bench, args.runs)
        return {}
    recipe, models = load_models(args.run) if args.run else random_slim(args.width, args.size or 224, args.share)
    size = args.size or recipe.data.size
    result = compare(recipe, models, size, args)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return result


def compare(recipe: Recipe, models: dict[str, nn.Module], size: int, args: argparse.Namespace) -> dict:
    reporter = Reporter(Console(stderr=True))
    jobs = []
    with tempfile.TemporaryDirectory() as folder, tolerance(UNTRAINED_TOLERANCE):
        for name, model in models.items():
            clean = without_subnormals(model).eval().requires_grad_(False)
            files = ModelFiles(name, clean, recipe, Path(folder), reporter).make(args.forms.split(","))
            shape = (args.batch, size, args.threads)
            jobs += [
                (name, form, BenchJob(f"{name} {form}", runtime, path, *shape, precision))
                for form, (runtime, path, precision) in files.items()
            ]
        timings, products, _ = measure([job for *_, job in jobs], args.seconds)
    for (_, _, job), timing in zip(jobs, timings, strict=True):
        if timing.error:
            raise RuntimeError(f"{job.name}: {timing.error}")
    ms: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, form, _), timing in zip(jobs, timings, strict=True):
        ms[name][form] = timing.median
    rate = products[args.threads]
    result = {"size": size, "batch": args.batch, "threads": args.threads, "gflops": rate, "models": {}}
    for name, model in models.items():
        sizes = total(count_modules(model, (3, size, size))[0])
        # Paper FLOPs are counted at 224×224, and grow with the area.
        paper = sizes["paper_flops"] and sizes["paper_flops"] * size**2 / 224**2
        limits = {
            key: 2 * args.batch * value / rate / 1e6
            for key, value in (("paper FLOPs", paper), ("MACs", sizes["macs"]))
            if value
        }
        # The limit is for float32.
        best = min((f for f in ms[name] if not f.endswith(("bf16", "int8"))), key=ms[name].get)
        result["models"][name] = {
            **sizes,
            "ms": ms[name],
            "faster": {f"{a} than {b}": ms[name][b] / ms[name][a] for a, b in PAIRS if {a, b} <= set(ms[name])},
            "best": best,
            "limits_ms": limits,
            "best_over_limit": {key: ms[name][best] / limit for key, limit in limits.items()},
        }
    if {"dense", "slim"} <= set(models):
        dense, small = (result["models"][name] for name in ("dense", "slim"))
        result["slim_over_dense"] = {
            "MACs": small["macs"] / dense["macs"],
            **{form: small["ms"][form] / dense["ms"][form] for form in small["ms"] if form in dense["ms"]},
        }
    return result


def show(result: dict) -> None:
    print(f"batch {result['batch']}, {result['size']}×{result['size']}, {result['threads']} threads, ", end="")
    print(f"matrix product {result['gflops']:.0f} GFLOP/s; medians in ms\n")
    forms = list(dict.fromkeys(form for entry in result["models"].values() for form in entry["ms"]))
    print("| model | " + " | ".join(forms) + " |")
    print("|---" * (len(forms) + 1) + "|")
    for name, entry in result["models"].items():
        print(f"| {name} | " + " | ".join(f"{entry['ms'][f]:.2f}" if f in entry["ms"] else "–" for f in forms) + " |")
    for name, entry in result["models"].items():
        print(f"\n{name}: {entry['params']:,} params, {entry['macs']:,} MACs")
        for pair, ratio in entry["faster"].items():
            print(f"  {pair}: {ratio:.2f} times faster")
        for key, ratio in entry["best_over_limit"].items():
            print(f"  best ({entry['best']}) ÷ limit from {key} ({entry['limits_ms'][key]:.2f} ms): {ratio:.2f}")
    if "slim_over_dense" in result:
        print("\nslim ÷ dense: " + ", ".join(f"{key} {ratio:.3f}" for key, ratio in result["slim_over_dense"].items()))


if __name__ == "__main__":
    main()
