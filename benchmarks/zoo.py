"""How many networks of torchvision, timm and transformers can be pruned, beside torch-pruning.

    python benchmarks/zoo.py torchvision timm transformers          # hours on two cores
    python benchmarks/zoo.py timm --only resnet vit convnext        # modules whose names begin like this
    python benchmarks/zoo.py torchvision --tools prunekit --ratio 0.5

Needs `pip install -r benchmarks/requirements-zoo.txt`. Nothing is downloaded: weights are random, norms are settled on
noise. Each network and tool has its own process, with a time limit. "Pruned" means: asked for 30% of the channels by
the magnitude of their weights, at least 20% of the parameters are gone, the model runs, and its outputs have the same
shapes. prunekit's models have also passed their equivalence check. torch-pruning is used as its examples use it: with
the heads of attentions, the layers of detectors that stay, and the attributes of attentions that are set afterwards.
Results are kept in --runs and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo_networks import build, names

from prunekit.pruning.graph.trace import tensors_in
from prunekit.utils.inputs import Example, call

LISTS = ("torchvision", "timm", "transformers")
TOOLS = ("prunekit", "torch-pruning")
LARGEST = 120_000_000  # parameters
GONE = 0.2  # share of the parameters
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
PROJECTIONS = "qkv qkv_proj q k v query key value q_proj k_proj v_proj q_lin k_lin v_lin".split()


def outputs(model: nn.Module, example: Example) -> list[tuple[int, ...]]:
    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in tensors_in(call(model, example))]


def prune(tool: str, model: nn.Module, example: Example, ratio: float) -> nn.Module:
    if tool == "prunekit":
        import prunekit

        options = {"importance": "magnitude", "pruning_ratio": ratio, "global_pruning": False}
        slim, _ = prunekit.Pruner(model, example, **options).step()
        return slim
    return prune_with_torch_pruning(model, example, ratio)


def prune_with_torch_pruning(model: nn.Module, example: Example, ratio: float) -> nn.Module:
    """Prune as torch-pruning's own examples do: with the heads of attentions, what must stay in detectors, and the
    attributes that are set by hand afterwards."""
    import torch_pruning as tp

    classes = {shape[axis] for shape in outputs(model, example) if len(shape) > 1 for axis in (1, -1)}
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in classes]
    heads = {}
    for module in model.modules():
        if (number := head_count(module)) is not None:
            heads |= {module: number} if isinstance(module, nn.MultiheadAttention) else {}
            heads |= {m: number for name, m in module.named_children() if name in PROJECTIONS and hasattr(m, "weight")}
    is_vit = type(model).__name__ == "VisionTransformer" and hasattr(model, "hidden_dim")
    pruner = tp.pruner.BasePruner(
        model,
        example,
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        num_heads=heads,
        global_pruning=False,
        ignored_layers=[*last, *parts_of_detectors(model)],
        round_to=model.encoder.layers[0].num_heads if is_vit else None,
    )
    pruner.step()
    for module in model.modules():
        layers = [m for name, m in module.named_children() if name in PROJECTIONS and m in pruner.num_heads]
        if layers and head_count(module) is not None:
            set_heads(module, layers[0].out_features, pruner.num_heads[layers[0]])
    if is_vit:
        model.hidden_dim = model.conv_proj.out_channels
    return model


def head_count(module: nn.Module) -> int | None:
    found = (getattr(module, name, None) for name in HEADS)
    return next((number for number in found if isinstance(number, int)), None)


def set_heads(module: nn.Module, width: int, number: int) -> None:
    """Set what code computes the sizes of an attention from, of the width of its first projection."""
    width //= 3 if any(hasattr(module, name) for name in ("qkv", "qkv_proj")) else 1
    sizes = dict.fromkeys(HEADS, number)
    sizes |= {"head_dim": width // number, "attention_head_size": width // number, "all_head_size": width}
    sizes["attn_dim"] = width
    for name, size in sizes.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, size)


def parts_of_detectors(model: nn.Module) -> list[nn.Module]:
    """What torch-pruning's example for torchvision ignores."""
    parts = ["corr_block", "update_block", "mask_predictor"]  # of RAFT
    parts += ["rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn", "roi_heads"]
    parts += ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"]
    parts += ["head.regression_head.bbox_ctrness"]
    parts += ["head"] if type(model).__name__ == "SSD" else []
    modules = dict(model.named_modules())
    return [modules[name] for name in parts if name in modules]


def worker(which: str, name: str, tool: str, ratio: float) -> dict[str, Any]:
    model, example = build(which, name)
    before, shapes = sum(p.numel() for p in model.parameters()), outputs(model, example)
    if before > LARGEST:
        return {"status": "too large", "params": before}
    start = time.process_time()
    try:
        slim = prune(tool, model, example, ratio)
    except Exception as error:
        return {
            "status": "failed",
            "params": before,
            "reason": f"{type(error).__name__}: {str(error).splitlines()[:1]}",
        }
    seconds = time.process_time() - start
    gone = 1 - sum(p.numel() for p in slim.parameters()) / before
    try:
        same = outputs(slim, example) == shapes
    except Exception as error:
        return {
            "status": "does not run",
            "params": before,
            "gone": gone,
            "reason": f"{type(error).__name__}: {error}"[:200],
        }
    status = "pruned" if same and gone >= GONE else "less than 20%" if same else "other shapes"
    reasons = reasons_of(model, example) if tool == "prunekit" and status != "pruned" else {}
    return {"status": status, "params": before, "gone": gone, "seconds": seconds, "reasons": reasons}


def reasons_of(model: nn.Module, example: Example) -> dict[str, int]:
    import prunekit

    found: dict[str, int] = {}
    for group in prunekit.find_groups(model, example):
        if group.reason and not group.reason.startswith("the model's"):
            found[group.reason] = found.get(group.reason, 0) + group.channels * group.params
    return dict(sorted(found.items(), key=lambda item: -item[1])[:4])


def run(which: str, name: str, tool: str, out: Path, args: argparse.Namespace) -> None:
    if out.is_file():
        return
    options = ["--ratio", str(args.ratio), "--limit", str(args.limit)]
    command = [sys.executable, __file__, which, "--worker", name, tool, *options]
    env = {**os.environ, "TIMM_FUSED_ATTN": "0" if tool == "torch-pruning" else "1"}  # as its example for timm does
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    result = json.loads(last) if last.startswith("{") else {"status": "failed", "reason": done.stderr[-300:]}
    if done.returncode == -signal.SIGXCPU:
        result = {"status": "time limit"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"list": which, "name": name, "tool": tool, **result}))
    print(
        f"{which} {name} {tool}: {result['status']} {result.get('gone', 0):.2f} {result.get('reason', '')}", flush=True
    )


def listed(which: str, runs: Path) -> list[str]:
    """The names of a list, from --runs if it is there: timm's take minutes to find."""
    file = runs / f"{which}.txt"
    if not file.is_file():
        runs.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(names(which)))
    return file.read_text().splitlines()


def rows(results: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    statuses = ("pruned", "less than 20%", "failed", "does not run", "other shapes", "time limit")
    yield ["list", "tool", "networks", *statuses]
    yield ["---"] * (3 + len(statuses))
    for which in LISTS:
        for tool in TOOLS:
            own = [r for r in results if (r["list"], r["tool"]) == (which, tool) and r["status"] != "too large"]
            if own:
                yield [which, tool, str(len(own)), *(str(sum(r["status"] == s for r in own)) for s in statuses)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="+", choices=LISTS, metavar="LIST")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="networks whose names begin like this")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--ratio", type=float, default=0.3, help="of the channels")
    parser.add_argument("--limit", type=int, default=300, help="seconds of CPU time for one network and tool")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"), metavar="DIR")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "TOOL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 10))
        print(json.dumps(worker(args.lists[0], *args.worker, args.ratio)))
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        for which in args.lists:
            for name in listed(which, args.runs):
                for tool in args.tools if name.startswith(tuple(args.only)) else ():
                    pool.submit(run, which, name, tool, args.runs / which / f"{name}-{tool}.json", args)
    results = [json.loads(file.read_text()) for file in sorted(args.runs.glob("*/*.json"))]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows(results)))


if __name__ == "__main__":
    main()
