"""Pruning at once and during training: the size that is reached, and the drift of the output.

    python benchmarks/one_shot.py                       # the table of benchmarks/README.md; some minutes
    python benchmarks/one_shot.py --networks mobilenet_v2 --size 64

The networks have random weights, β of a given deviation, and running statistics of the images. A random share of their
gates is small, and these channels are cut. What their readers see is replaced by its mean over 8 images (what ``slim``
does), by the mean of what the channels emit with their gates at zero, or by zero. The drift is the largest difference
from the dense model on other images, relative to its largest logit. With ``exact``, ``slim`` keeps channels instead.
The target is that of a second pruning of the same network, and of a third one, gradually over a few steps of training.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from architectures import MOBILE, TINY
from surgery import pink, prepare, table
from torch import Tensor, nn

import prunekit
from prunekit.flops import count
from prunekit.pruning.plan import Group
from prunekit.pruning.selection.budget import BudgetSearch
from prunekit.pruning.surgery.constant_folding import Constants, measure_constants
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.equivalence import outputs_of, zero_dead_gates
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.pruning.surgery.rebuild import mask_responses
from prunekit.pruning.surgery.slim import slim


def drift_of(
    model: nn.Module, groups: Sequence[Group], dead: dict[str, set[int]], example: Tensor, test: Tensor
) -> dict[str, float]:
    """Return the drift for each replacement, relative to the largest output; all in float64."""
    dead, removed = Cutter(model, groups).complete(dead)
    means = measure_constants(model, groups, dead, [example])
    gated = measure_constants(zero_dead_gates(model, groups, dead), groups, dead, [example])
    kinds: dict[str, Constants] = {"mean": means, "constant": gated, "zero": replace(means, means={})}
    (dense,) = outputs_of(model, test)
    found = {}
    for kind, constants in kinds.items():
        (output,) = outputs_of(mask_responses(model, groups, dead, constants, removed), test)
        found[kind] = float((output - dense).abs().max() / dense.abs().max())
    return found


def prune_gradually(model: nn.Module, example: Tensor, target: float, steps: int = 8) -> tuple[float, float]:
    """Train with gradual pruning; return the share of the multiply-adds that is left, and the relative drift."""
    model = copy.deepcopy(model).train()
    pruner = prunekit.Pruner(model, example, target={"macs_ratio": target})
    gradual, optimizer = pruner.gradual(steps), torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
        gradual.step()
    _, report = pruner.step()
    return report.after.macs / report.before.macs, report.equivalence.drift / report.equivalence.output_size


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Prune one network to the target, with and without ``exact``."""
    case = prepare((MOBILE | TINY)[name], args.size, args.share, args.beta, gate=args.gate)
    generator = torch.Generator().manual_seed(1)
    example, test = (pink(args.images, args.size, generator) for _ in range(2))
    dense = count(case.model, example).macs
    result: dict[str, object] = {"network": name, "channels": case.channels}
    for key, exact in (("macs", False), ("macs_exact", True)):
        small, report = slim(case.model, case.plan, example, groups=case.groups, exact=exact)
        result[key] = count(small, example).macs / dense
    result["given_back"] = report.given_back
    search = BudgetSearch(case.model, case.groups, example.shape[1:], None)
    small, *_ = search.slim(search.budget(macs_ratio=args.target), example)
    result["target"] = count(small, example).macs / dense
    result["gradual"], result["gradual_drift"] = prune_gradually(case.model, example, args.target)
    model, dead = copy.deepcopy(case.model).double(), dead_channels(case.groups, case.plan)
    result["drift"] = drift_of(model, case.groups, dead, example.double(), test.double())
    return result


def main(argv: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(MOBILE), choices=[*MOBILE, *TINY], metavar="NAME")
    parser.add_argument("--size", type=int, default=64, help="side of the input")
    parser.add_argument("--images", type=int, default=8, help="number of images for the means")
    parser.add_argument("--share", type=float, default=0.3, help="share of the channels that is cut")
    parser.add_argument("--gate", type=float, default=0.1, help="largest gate of a channel that is cut")
    parser.add_argument("--target", type=float, default=0.5, help="of the multiply-adds, for the second pruning")
    parser.add_argument("--beta", type=float, default=0.1, help="standard deviation of β")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="torch_pruning")
    torch.set_num_threads(1)
    header = ["Network", "Channels", "MACs", "exact: MACs", "given back", "target", "gradual", "drift"]
    results, rows = [], [[*header, "mean", "constant", "zero"]]
    for name in args.networks:
        print(name, file=sys.stderr)
        result = measure(name, args)
        results.append(result)
        shares = [f"{result[key]:.1%}" for key in ("macs", "macs_exact", "target", "gradual")]
        shares.insert(2, f"{result['given_back']:,}")
        shares.append(f"{result['gradual_drift']:.1e}")
        rows.append([name, f"{result['channels']:,}", *shares, *(f"{v:.2g}" for v in result["drift"].values())])
    print(table(rows))
    return results


if __name__ == "__main__":
    main()
