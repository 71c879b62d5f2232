"""Gradual pruning compared with other ways to the same size, at equal numbers of epochs.

    python benchmarks/gradual.py csnet digits_resnet digits_octresnet                # minutes per run on two cores
    python benchmarks/gradual.py cifar_resnet --set data.root=~/CIFAR-10/train data.val_root=~/CIFAR-10/val
    python benchmarks/gradual.py digits_resnet --ways dense gradual bn_scale --seeds 0 --ratios 0.2

Each run but the last two is a prunekit command, which is printed first; complete runs are not repeated. A way that
fine-tunes spends a quarter of the epochs on it.

    dense       without decay and pruning
    gradual     the recipe
    threshold   sparse training, then pruning at once by gates, then fine-tuning
    l1          as gradual by gates, with the penalty of network slimming
    magnitude   as gradual, without a penalty, channels ranked by the size of their weights
    bn_scale    BNScalePruner of torch-pruning by its manual: regularize in every step, prune, fine-tune
    group_norm  GroupNormPruner of torch-pruning likewise
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import statistics
import subprocess
import sys
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from prunekit.config import registry
from prunekit.config.recipe import load
from prunekit.data.datasets import normalize
from prunekit.flops import count_modules, total
from prunekit.pipeline.context import RunContext
from prunekit.pipeline.models import build_dense
from prunekit.pipeline.training_setup import build_loss
from prunekit.training.optimizers import param_groups
from prunekit.training.trainer import bind_options
from prunekit.utils.progress import Reporter

NO_TARGET = ["train.gradual_pruning.start=null", "target.params_ratio=null", "target.macs_ratio=null"]
BY_GATES = ["slim.importance=gate", "slim.cost_power=0"]
WAYS = {
    "dense": [*NO_TARGET, "decay.name=none", "slim.threshold=0", *BY_GATES],
    "gradual": [],
    "threshold": ["train.gradual_pruning.start=null", *BY_GATES],
    "l1": ["decay.name=l1", "decay.weight=1e-3", *BY_GATES],
    "magnitude": ["decay.name=none", "slim.importance=magnitude", "slim.cost_power=0"],
}
TORCH_PRUNING = ("bn_scale", "group_norm")
STEPS = 1000  # torch-pruning takes a ratio of channels; the one for the size is found in steps of 1 ÷ STEPS


def regularized_pruner(way: str, model: nn.Module, example: torch.Tensor, ratio: float) -> Any:
    """Return torch-pruning's pruner of a model without its last layer, as in its examples."""
    import torch_pruning as tp

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    kinds = {
        "bn_scale": (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance, 1e-5),
        "group_norm": (tp.pruner.GroupNormPruner, tp.importance.GroupMagnitudeImportance, 1e-4),
    }
    kind, importance, reg = kinds[way]
    options = {"global_pruning": True, "pruning_ratio": ratio, "ignored_layers": last, "reg": reg}
    return kind(model, example, importance=importance(), **options)


def prune_to(way: str, model: nn.Module, example: torch.Tensor, key: str, goal: float) -> nn.Module:
    """Return a copy that torch-pruning has pruned to at most ``goal`` of the parameters or multiply-adds."""
    shape, measure = tuple(example.shape[1:]), key.removesuffix("_ratio")

    def pruned(index: int) -> nn.Module:
        copied = copy.deepcopy(model)
        regularized_pruner(way, copied, example, index / STEPS).step()
        return copied

    def is_met(index: int) -> bool:
        return size(pruned(index)) <= goal * full

    def size(some: nn.Module) -> int:
        return total(count_modules(some, shape)[0])[measure]

    full = size(model)
    return pruned(bisect_left(range(STEPS), True, key=is_met))


def train(context: RunContext, model: nn.Module, stage: str, epochs: int, pruner: Any = None) -> None:
    """Train a model as the recipe's stage does, without its decay."""
    section, data = getattr(context.recipe, stage), context.tensors("train")
    optimizer = bind_options(registry.optimizers, section.optimizer)(param_groups(model, section.lr, section.gate_lr))
    schedule, augment = (
        bind_options(registry.schedules, section.schedule),
        bind_options(registry.augmentations, section.augment),
    )
    loss, base = build_loss(context, section), [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(context.recipe.seed)
    torch.manual_seed(context.recipe.seed)
    steps, done = len(data) // section.batch_size, 0
    for _ in range(epochs):
        model.train()
        if pruner is not None:
            pruner.update_regularizer()
        order = torch.randperm(len(data), generator=generator)
        for rows in order[: steps * section.batch_size].split(section.batch_size):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * schedule(done / (epochs * steps))
            images, targets = augment(data.images[rows], data.targets[rows], data.sizes[rows], generator)
            optimizer.zero_grad()
            loss(model(normalize(images)), targets).backward()
            if pruner is not None:
                pruner.regularize(model)
            optimizer.step()
            done += 1
    model.eval()


def run_torch_pruning(way: str, name: str, overrides: Sequence[str], out: Path) -> None:
    """Train with torch-pruning's regularization, prune, fine-tune, and write what a run's summary has."""
    warnings.filterwarnings("ignore", module="torch_pruning")
    recipe = load(name, list(overrides))
    ((key, goal),) = recipe.target.given.items()
    context = RunContext(recipe, Reporter(Console(stderr=True)))
    model, example = build_dense(recipe), context.example()[:1]
    train(context, model, "train", recipe.train.epochs, regularized_pruner(way, model, example, 0.5))
    summary = {"dense": measured(context, model)}
    model = prune_to(way, model, example, key, goal)
    summary["slim"] = measured(context, model)
    train(context, model, "finetune", recipe.finetune.epochs)
    summary["finetuned"] = measured(context, model)
    ratios = {f"{one}_ratio": summary["slim"][one] / summary["dense"][one] for one in ("params", "macs")}
    out.mkdir(parents=True)
    (out / "summary.json").write_text(json.dumps({"status": "complete", **summary, "kept": ratios}))


def measured(context: RunContext, model: nn.Module) -> dict[str, Any]:
    recipe = context.recipe
    counter = context.reporter.progress_bar("evaluate")
    result = context.task.evaluate(model.eval(), context.dataset("val"), recipe.data.size, 256, counter)
    counter.close()
    return {**total(count_modules(model, context.shape)[0]), "metrics": result.metrics}


def overrides_of(way: str, name: str, ratio: float | None, seed: int, given: Sequence[str]) -> list[str]:
    recipe = load(name, list(given))
    keys = [*given, f"seed={seed}", *WAYS.get(way, WAYS["threshold"])]
    if ratio is not None:
        (key,) = recipe.target.given
        keys.append(f"target.{key}={ratio}")
    if way == "threshold" and recipe.decay.name == "none":
        keys += ["decay.name=dynamic", "decay.weight=1"]
    if way in ("threshold", *TORCH_PRUNING):
        tuning = max(1, recipe.train.epochs // 4)
        keys += [f"train.epochs={recipe.train.epochs - tuning}", f"finetune.epochs={tuning}"]
    return [*keys, "export.onnx=false"]


def run(way: str, name: str, keys: Sequence[str], out: Path, threads: int) -> None:
    if (out / "summary.json").is_file() and json.loads((out / "summary.json").read_text())["status"] == "complete":
        return
    if way in TORCH_PRUNING:
        command = [sys.executable, __file__, name, "--worker", way, str(out), "--set", *keys]
    else:
        words = ["run", name, *keys, "--out", str(out), *(["--resume"] if out.exists() else [])]
        command = [sys.executable, "-m", "prunekit.cli", *words]
        print(f"prunekit {shlex.join(words)}\n", end="", flush=True)  # one write, since two runs may print at once
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.log").open("a") as log:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode:
            print(f"failed; see {out.with_name(f'{out.name}.log')}", flush=True)


def rows(runs: Path, cases: Sequence[tuple[str, str, float | None]], seeds: Sequence[int]) -> list[list[str]]:
    """Return a row per recipe, way and ratio: means over the seeds of sizes and of the main metric."""
    found = []
    for name, way, ratio in cases:
        files = [runs / f"{name}-{way}-{ratio}-{seed}" / "summary.json" for seed in seeds]
        summaries = [json.loads(file.read_text()) for file in files if file.is_file()]
        summaries = [one for one in summaries if one["status"] == "complete"]
        if not summaries:
            continue
        metric = next(iter(summaries[0]["dense"]["metrics"]))
        row = [name, way, f"{ratio or 1:g}"]
        row += [
            f"{statistics.mean(one['kept'][key] for one in summaries):.3f}" for key in ("params_ratio", "macs_ratio")
        ]
        for model in ("dense", "slim", "finetuned"):
            values = [one[model]["metrics"][metric] for one in summaries]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.4f}{spread}")
        drifts = [one["drift"]["max_abs_diff"] for one in summaries if "drift" in one]
        found.append([*row, f"{max(drifts):.1e}" if drifts else "", str(len(summaries))])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *TORCH_PRUNING], choices=[*WAYS, *TORCH_PRUNING])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.35, 0.5], help="of the recipe's target")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipes")
    parser.add_argument("--runs", type=Path, default=Path("runs/gradual"), metavar="DIR")
    parser.add_argument("--side-by-side", action="store_true", help="two runs at a time, one thread each")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        run_torch_pruning(args.worker[0], args.recipes[0], args.set, Path(args.worker[1]))
        return
    ways = [(way, ratio) for way in args.ways for ratio in ([None] if way == "dense" else args.ratios)]
    cases = [(name, way, ratio) for name in args.recipes for way, ratio in ways]
    with ThreadPoolExecutor(2 if args.side_by_side else 1) as pool:
        for seed in args.seeds:
            for name, way, ratio in cases:
                keys = overrides_of(way, name, ratio, seed, args.set)
                out = args.runs / f"{name}-{way}-{ratio}-{seed}"
                pool.submit(run, way, name, keys, out, 1 if args.side_by_side else 2)
    header = ["Recipe", "Way", "Asked", "Params", "MACs", "Trained", "Slim", "Fine-tuned", "Drift", "Seeds"]
    lines = [header, ["---"] * len(header), *rows(args.runs, cases, args.seeds)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
