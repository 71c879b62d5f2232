"""How the time of a forward pass grows with width, depth, resolution and batch size, as fitted exponents.

    python benchmarks/scaling.py                        # CSNet and an octave ResNet, eager and deployed
    python benchmarks/scaling.py --json
    python benchmarks/scaling.py --widths 8 16 --depths 8 14 --sizes 32 48 --batches 1 2 --seconds 0.02 --size 32

The exponent of the MACs is given for comparison. The points of an axis are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from prunekit.backbones import build
from prunekit.commands.bench import estimate_norm_statistics
from prunekit.deployment.bench.model_transfer import pack_model
from prunekit.deployment.bench.timing import BenchJob, measure
from prunekit.deployment.deploy import deploy
from prunekit.flops import count_modules, total
from prunekit.pruning.plan import Builder

FORMS = ("eager", "deployed")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[10, 20, 40, 80])
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 20, 32, 56], help="of an octave ResNet")
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 224, 320])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--width", type=int, default=20, help="of CSNet, on the other axes")
    parser.add_argument("--size", type=int, default=128, help="on the other axes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    def csnet(width: int) -> Builder:
        return Builder(name="csnet", options={"width": width})

    def octresnet(depth: int) -> Builder:
        return Builder(name="octresnet", options={"depth": depth, "width": 16})

    fixed = csnet(args.width)
    axes: dict[str, list[tuple[int, Builder, int, int]]] = {
        "width": [(w, csnet(w), args.size, 1) for w in args.widths],
        "depth": [(d, octresnet(d), args.size, 1) for d in args.depths],
        "resolution": [(s, fixed, s, 1) for s in args.sizes],
        "batch": [(b, fixed, args.size, b) for b in args.batches],
    }
    result = {axis: grow(points, args) for axis, points in axes.items() if points}
    print(json.dumps(result)) if args.json else show(result)
    return result


def grow(points: Sequence[tuple[int, Builder, int, int]], args: argparse.Namespace) -> dict:
    """Milliseconds and MACs at each point of an axis, their ratios to the first point, and fitted exponents."""
    jobs, macs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, (_, builder, size, batch) in enumerate(points):
            model = build(builder.name, builder.options)
            model = estimate_norm_statistics(model, (3, size, size)).requires_grad_(False)
            macs.append(batch * total(count_modules(model, (3, size, size))[0])["macs"])
            example = torch.randn(2, 3, size, size)
            for form in FORMS:
                path = Path(folder) / f"{index}-{form}.safetensors"
                config = None if form == "eager" else deploy(model, example)[1].config
                pack_model(path, model, builder, config, (3, size, size))
                jobs.append(BenchJob(f"{form} {index}", "torch", path, batch, size, args.threads))
        timings, *_ = measure(jobs, args.seconds)
    for job, timing in zip(jobs, timings, strict=True):
        if timing.error:
            raise RuntimeError(f"{job.name}: {timing.error}")
    values = [value for value, *_ in points]
    ms = {form: [t.median for t in timings[i :: len(FORMS)]] for i, form in enumerate(FORMS)}
    return {
        "values": values,
        "ms": ms,
        "ratios": {form: [value / times[0] for value in times] for form, times in {**ms, "MACs": macs}.items()},
        "exponents": {form: fit_exponent(values, times) for form, times in {**ms, "MACs": macs}.items()},
    }


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ∝ x^p, fitted to the logarithms; NaN for fewer than two different x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else float("nan")


def show(result: dict) -> None:
    for axis, entry in result.items():
        print(f"\n| {axis} | " + " | ".join(map(str, entry["values"])) + " | exponent |")
        print("|---" * (len(entry["values"]) + 2) + "|")
        for form, ratios in entry["ratios"].items():
            print(f"| {form} | " + " | ".join(f"{r:.2f}" for r in ratios) + f" | {entry['exponents'][form]:.2f} |")


if __name__ == "__main__":
    main()
