"""Time of pruning networks of torchvision and timm/ prunekit compared with torch-pruning.

    pip install -r benchmarks/requirements-zoo.txt      # in an environment of its own, with torch-pruning
    python benchmarks/step_time.py                                  # ten minutes on one thread
    python benchmarks/step_time.py resnet18 timm/test_vit --repeats 5

Two ratios, prunekit's time ÷ torch-pruning's, for 30% of the channels of each layer but the classifier:

- find + cut: ``find_groups``, ``Cutter.complete`` and ``Cutter.cut`` of random channels, against ``BasePruner`` with
  ``RandomImportance``, its construction and its ``step()``;
- step: ``Pruner``, its construction and its ``step()`` (with all checks and counts), against ``BasePruner`` with
  ``GroupMagnitudeImportance``.

Random weights, norms settled on noise, batches of 2. Each repeat runs all four on copies of the model, the libraries
first in turns. The ratios are those of the smallest process times, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch_pruning as tp
import zoo_networks
from torch import Tensor, nn

import prunekit
from prunekit.pruning.graph.groups import find_groups
from prunekit.pruning.surgery.cutter import Cutter

NETWORKS = (
    "resnet18 resnet50 densenet121 densenet201 mobilenet_v2 efficientnet_b0 convnext_tiny vit_b_16 "
    "regnet_y_400mf mnasnet1_0 squeezenet1_1 vgg11_bn timm/mobilenetv3_small_050 timm/test_vit timm/test_resnet "
    "timm/test_efficientnet timm/test_convnext"
).split()


def build(name: str) -> tuple[nn.Module, Tensor]:
    return zoo_networks.build(*name.split("/")) if "/" in name else zoo_networks.build("torchvision", name)


def classifier(model: nn.Module) -> nn.Module:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def find_and_cut(model: nn.Module, example: Tensor, ratio: float) -> None:
    groups = find_groups(model, example)
    head = f"{next(name for name, module in model.named_modules() if module is classifier(model))}.weight"
    free = [g for g in groups if g.reason is None and all((m.tensor, m.axis) != (head, 0) for m in g.members)]
    random = np.random.default_rng(0)
    dead = {g.id: set(random.permutation(g.channels)[: int(ratio * g.channels)].tolist()) for g in free}
    cutter = Cutter(model, groups)
    cutter.cut(model, *cutter.complete(dead))


def step(model: nn.Module, example: Tensor, ratio: float) -> None:
    options = {"importance": "magnitude", "global_pruning": False, "ignored_layers": [classifier(model)]}
    prunekit.Pruner(model, example, pruning_ratio=ratio, **options).step()


def torch_pruning_step(model: nn.Module, example: Tensor, ratio: float, importance: Callable[..., object]) -> None:
    heads = {m: m.num_heads for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)}
    options = {"pruning_ratio": ratio, "global_pruning": False, "ignored_layers": [classifier(model)]}
    tp.pruner.BasePruner(model, example, importance, num_heads=heads, **options).step()


def seconds(work: Callable[..., object], model: nn.Module, *args: object) -> float:
    copied = copy.deepcopy(model)
    gc.collect()
    start = time.process_time()
    work(copied, *args)
    return time.process_time() - start


def measure(name: str, args: argparse.Namespace) -> list[float]:
    model, example = build(name)
    random, magnitude = tp.importance.RandomImportance(), tp.importance.GroupMagnitudeImportance()
    runs = [(find_and_cut, ()), (torch_pruning_step, (random,)), (step, ()), (torch_pruning_step, (magnitude,))]
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(args.repeats):
        for number in range(len(runs)) if turn % 2 == 0 else (1, 0, 3, 2):
            work, more = runs[number]
            found[number].append(seconds(work, model, example, args.ratio, *more))
    return [min(values) for values in found]


def main(argv: Sequence[str] | None = None) -> list[list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.3, help="of the channels")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | find + cut, s | torch-pruning, s | ratio | step, s | torch-pruning, s | ratio |\n|" + "---|" * 7)
    ratios = []
    for name in args.networks:
        try:
            a, b, c, d = measure(name, args)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:90]} |", flush=True)
            continue
        ratios.append([a / b, c / d])
        print(f"| {name} | {a:.3f} | {b:.3f} | {a / b:.2f} | {c:.2f} | {d:.2f} | {c / d:.2f} |", flush=True)
    print("| median | | | {:.2f} | | | {:.2f} |".format(*np.median(np.reshape(ratios, (-1, 2)), 0)))
    return ratios


if __name__ == "__main__":
    main()
