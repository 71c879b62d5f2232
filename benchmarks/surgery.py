"""Finding groups and removing channels: prunekit compared with torch-pruning's dependency graph on the same models.

    python benchmarks/surgery.py                              # the tables of benchmarks/README.md; some minutes
    python benchmarks/surgery.py --networks tiny-resnet --depths 1 2 --repeats 1 --size 64
    python benchmarks/surgery.py --json > surgery.json

Timed on one thread, in process time, alternating between the two:

- prunekit: ``find_groups`` and the removal of dead channels with constant folding;
- torch-pruning, fastest use: ``DependencyGraph().build_dependency``, then ``get_pruning_group`` and ``prune`` for one
  convolution of each set of coupled channels. Which convolution is given to it, outside of the timing;
- torch-pruning as documented (once, for comparison): ``get_all_groups``, then as above; and
  ``BNScalePruner(...).step()``, which chooses other channels, so that its output is not compared.

The equivalence check (both models in float64 at two sizes) has no counterpart in torch-pruning. Its time is a separate
column and not part of any ratio.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch_pruning as tp
from architectures import NETWORKS, TINY, deep_densenet, deep_resnet
from torch import Tensor, nn

from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.constant_folding import measure_constants
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.plan_builder import dead_channels, make_plan
from prunekit.pruning.surgery.rebuild import rebuild
from prunekit.pruning.surgery.slim import slim

DEEP = {"resnet": deep_resnet, "densenet": deep_densenet}


@dataclass
class Case:
    """A model in eval mode whose dead gates are zero, and the channels that both libraries remove."""

    model: nn.Module
    example: Tensor
    groups: list[Group]
    plan: Plan
    roots: dict[str, list[int]] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return sum(group.channels - len(self.plan.kept(group)) for group in self.groups if group.reason is None)


def prepare(
    build: Callable[[], nn.Module], size: int, share: float, beta: float, seed: int = 0, gate: float = 0.0
) -> Case:
    """Return a network with running statistics, β of deviation ``beta``, and a random share of gates up to ``gate``."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build()
    example = pink(1, size, generator)
    groups = find_groups(model, example)
    dead = {}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0, beta, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.momentum = None  # a plain average over the batches
        for group in groups:
            if group.reason is None:
                count = min(round(share * group.channels), group.channels - 1)
                dead[group.id] = torch.randperm(group.channels, generator=generator)[:count].sort().values.tolist()
                for norm in group.gates:
                    small = gate * torch.rand(count, generator=generator)
                    model.get_submodule(norm.norm).weight[norm.slice[0] : norm.slice[1]][dead[group.id]] = small
        model.train()
        for batch in (torch.randn(4, 3, size, size, generator=generator), pink(4, size, generator)):
            model(batch)
    case = Case(model.eval(), example, groups, make_plan(model, groups, dead))
    for group in groups:
        if dead.get(group.id):
            member = next(m for m in group.members if m.axis == 0)
            root = case.roots.setdefault(member.tensor.removesuffix(".weight"), [])
            root += [member.offset + channel for channel in dead[group.id]]
    return case


def pink(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return noise with amplitude 1/frequency, like natural images: (count, 3, size, size), deviation 1."""
    frequency = torch.fft.fftfreq(size)[:, None].hypot(torch.fft.fftfreq(size)[None]).clamp(min=1 / size)
    spectrum = torch.fft.fft2(torch.randn(count, 3, size, size, generator=generator)) / frequency
    image = torch.fft.ifft2(spectrum).real
    return image / image.std((1, 2, 3), keepdim=True)


def cut(model: nn.Module, groups: Sequence[Group], case: Case) -> nn.Module:
    """Remove channels with prunekit, with constant folding, in place and without the equivalence check."""
    dead, _ = Cutter(model, groups).complete(dead_channels(groups, case.plan))
    constants = measure_constants(model, groups, dead, [resize(case.example)])
    rebuild(model, groups, dead, constants, carry=True)
    return model


def resize(example: Tensor) -> Tensor:
    """Resize the example to 64×64 to measure constants, which need no larger maps in these networks."""
    size = [min(side, 64) for side in example.shape[2:]]
    return torch.nn.functional.interpolate(example, size=size, mode="bilinear")


def torch_pruning_cut(model: nn.Module, case: Case, all_groups: bool = False) -> nn.Module:
    graph = tp.DependencyGraph().build_dependency(model, (case.example,), verbose=False)
    modules = {name: model.get_submodule(name) for name in case.roots}
    if all_groups:
        list(graph.get_all_groups())
    for name, channels in case.roots.items():
        graph.get_pruning_group(modules[name], tp.prune_conv_out_channels, channels).prune(record_history=False)
    return model


def torch_pruning_pruner(model: nn.Module, case: Case, share: float) -> nn.Module:
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    importance = tp.importance.BNScaleImportance()
    tp.pruner.BNScalePruner(
        model, (case.example,), importance, pruning_ratio=share, global_pruning=True, ignored_layers=head
    ).step()
    return model


def clock(work: Callable[[], object]) -> tuple[float, object]:
    """Return the process time in seconds and the result."""
    gc.collect()
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": len(seconds)}


def run_alternately(case: Case, repeats: int) -> tuple[dict[str, list[float]], nn.Module, nn.Module]:
    """Run both libraries alternately on copies of the model; return the seconds of each run and both results."""
    seconds: dict[str, list[float]] = {"find": [], "cut": [], "ours": [], "theirs": []}
    mine = other = case.model
    for turn in range(repeats):
        for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
            model = copy.deepcopy(case.model)
            if side == "theirs":
                taken, other = clock(lambda model=model: torch_pruning_cut(model, case))
            else:
                find, groups = clock(lambda model=model: find_groups(model, case.example))
                taken, mine = clock(lambda model=model, groups=groups: cut(model, groups, case))
                seconds["find"].append(find)
                seconds["cut"].append(taken)
                taken += find
            seconds[side].append(taken)
    return seconds, mine, other


@torch.no_grad()
def differences(case: Case, other: nn.Module, seed: int = 1) -> dict[str, dict[str, float]]:
    """Return the largest difference to the gated dense model for each library, kind of input and precision.

    ``other`` is torch-pruning's model; prunekit runs in each precision. "…_relative" is relative to the largest output.
    """
    size = case.example.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    inputs = {"random": torch.randn(2, 3, size, size, generator=generator), "pink": pink(2, size, generator)}
    found: dict[str, dict[str, float]] = {"ours": {}, "theirs": {}}
    for dtype, tag in ((torch.float64, "float64"), (torch.float32, "float32")):
        dense = copy.deepcopy(case.model).to(dtype)
        typed = replace(case, example=case.example.to(dtype))
        sides = {"ours": cut(copy.deepcopy(dense), case.groups, typed), "theirs": copy.deepcopy(other).to(dtype)}
        for kind, batch in inputs.items():
            wanted = dense(batch.to(dtype))
            if not wanted.isfinite().all() or not (wanted[0] != wanted[1]).any():
                raise RuntimeError("the dense network is dead, so the comparison says nothing; use another --share")
            for side, model in sides.items():
                gap = float((model(batch.to(dtype)) - wanted).abs().max())
                found[side][f"{kind}_{tag}"] = gap
                if dtype == torch.float64:
                    found[side][f"{kind}_relative"] = gap / float(wanted.abs().max())
    return found


def compare(name: str, build: Callable[[], nn.Module], args: argparse.Namespace) -> dict:
    case = prepare(build, args.size, args.share, args.beta)
    seconds, mine, other = run_alternately(case, args.repeats)
    result = {"network": name, "params": count(case.model), "channels_cut": case.channels}
    result["params_ours"], result["params_theirs"] = count(mine), count(other)
    result["seconds"] = {key: spread(values) for key, values in seconds.items()}
    result["ratio"] = result["seconds"]["ours"]["median"] / result["seconds"]["theirs"]["median"]
    checked, _ = clock(lambda: slim(case.model, case.plan, case.example, groups=case.groups, exact=True))
    result["seconds_with_equivalence"] = checked + result["seconds"]["find"]["median"]
    if not args.quick:
        copies = [copy.deepcopy(case.model) for _ in range(2)]
        result["seconds_theirs_all_groups"], _ = clock(lambda: torch_pruning_cut(copies[0], case, all_groups=True))
        result["seconds_their_pruner"], _ = clock(lambda: torch_pruning_pruner(copies[1], case, args.share))
    result["difference"] = differences(case, other)
    return result


def measure_depth(kind: str, args: argparse.Namespace) -> dict:
    """Return the seconds at each depth and the exponent of a power law fitted to them."""
    points = []
    for depth in args.depths:
        case = prepare(lambda depth=depth: DEEP[kind](depth), args.depth_size, args.share, args.beta)
        seconds, _, _ = run_alternately(case, args.depth_repeats)
        layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in case.model.modules())
        forward = min(clock(lambda case=case: case.model(case.example))[0] for _ in range(3))
        points.append(
            {"layers": layers, "forward": forward} | {key: statistics.median(values) for key, values in seconds.items()}
        )
    return {"kind": kind, "points": points} | {
        f"exponent_{key}": exponent([p["layers"] for p in points], [p[key] for p in points])
        for key in ("ours", "find", "theirs", "forward")
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent b of the best fit y = a·x^b; NaN for a single point."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(x) > 1 else float("nan")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def show(results: dict) -> None:
    def run(spread: dict[str, float]) -> str:
        return f"{spread['median']:.3f} ({spread['min']:.3f}–{spread['max']:.3f})"

    rows = [
        [
            "network",
            "channels cut",
            "find, s",
            "cut, s",
            "ours, s",
            "torch-pruning, s",
            "ours ÷ theirs",
            "with our equivalence check, s",
        ]
    ]
    rows[0] += ["all groups, s", "BNScalePruner, s"]
    gaps = [
        ["network", "input", "ours float64", "ours float32", "theirs float64", "theirs float32", "theirs, relative"]
    ]
    for r in results["networks"]:
        s, gap = r["seconds"], r["difference"]
        more = [f"{r[k]:.2f}" if k in r else "–" for k in ("seconds_theirs_all_groups", "seconds_their_pruner")]
        rows.append([r["network"], str(r["channels_cut"]), f"{s['find']['median']:.3f}", f"{s['cut']['median']:.3f}"])
        rows[-1] += [
            run(s["ours"]),
            run(s["theirs"]),
            f"{r['ratio']:.2f}",
            f"{r['seconds_with_equivalence']:.2f}",
            *more,
        ]
        for kind in ("random", "pink"):
            gaps.append([r["network"], kind])
            gaps[-1] += [f"{gap[side][f'{kind}_{tag}']:.1e}" for side in gap for tag in ("float64", "float32")]
            gaps[-1].append(f"{gap['theirs'][f'{kind}_relative']:.0%}")
    print(f"{results['device']}, one thread, process time: median (min–max) of {results['repeats']} runs")
    if results["networks"]:
        print(f"\nInputs of {results['size']} × {results['size']}\n\n{table(rows)}")
        print(f"\nLargest difference to the dense model with its dead gates at zero\n\n{table(gaps)}")
    for d in results["depth"]:
        print(f"\nSeconds against depth, {d['kind']} of {', '.join(str(p['layers']) for p in d['points'])} layers")
        for key in ("ours", "find", "theirs", "forward"):
            points = ", ".join(f"{p[key]:.3f}" for p in d["points"])
            print(f"  {key:8} {points}   ~ depth^{d[f'exponent_{key}']:.2f}")


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=[*NETWORKS, *TINY], metavar="NAME")
    parser.add_argument("--depths", nargs="*", type=int, default=[4, 8, 16, 32], help="layers or blocks of each stage")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth-repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224, help="side of the input")
    parser.add_argument("--depth-size", type=int, default=64, help="side of the input of the deep networks")
    parser.add_argument("--share", type=float, default=0.3, help="share of gates that are zero")
    parser.add_argument("--beta", type=float, default=0.1, help="standard deviation of β")
    parser.add_argument("--quick", action="store_true", help="skip torch-pruning's slower variants")
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON instead of tables")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="torch_pruning")
    torch.set_num_threads(1)
    run_alternately(prepare(TINY["tiny-resnet"], 64, args.share, args.beta), 1)  # warm-up
    results = {"device": device(), "torch": torch.__version__, "torch_pruning": tp.__version__}
    results |= {"size": args.size, "repeats": args.repeats, "networks": [], "depth": []}
    for name in args.networks:
        print(name, file=sys.stderr)
        results["networks"].append(compare(name, (NETWORKS | TINY)[name], args))
    for kind in DEEP if args.depths else ():
        print(f"depth: {kind}", file=sys.stderr)
        results["depth"].append(measure_depth(kind, args))
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    return results


def device() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
