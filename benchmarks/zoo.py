"""How many networks of torchvision, timm and transformers can be pruned, beside torch-pruning.

    python benchmarks/zoo.py torchvision timm transformers          # hours on two cores
    python benchmarks/zoo.py timm --only resnet vit convnext        # modules whose names begin like this
    python benchmarks/zoo.py torchvision --tools prunekit --ratio 0.5

Needs `pip install -r benchmarks/requirements-zoo.txt`. Nothing is downloaded: weights are random, norms are settled on
noise. Each network and tool has its own process, with a time limit. "Pruned" means: asked for 30% of the channels by
the magnitude of their weights, at least 20% of the parameters are gone, the model runs, and its outputs have the same
shapes. prunekit's models have also passed their equivalence check. Results are kept in --runs and not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.pruning.graph.trace import tensors_in

LISTS = ("torchvision", "timm", "transformers")
TOOLS = ("prunekit", "torch-pruning")
LARGEST = 120_000_000  # parameters
GONE = 0.2  # share of the parameters
# Model types of transformers that take images, with small configurations.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "mobilenet_v1": {},
    "mobilenet_v2": {},
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 0.5, "image_size": 224, "hidden_dim": 1280},
    "regnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "groups_width": 8},
    "levit": {},
    "segformer": {},
    "convnext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "bit": {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [1, 2]},
    "poolformer": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    "vit": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "deit": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "beit": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "dinov2": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 224},
    "swin": {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
    "swinv2": {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
    "pvt_v2": {},
    "focalnet": {"embed_dim": 24, "depths": [1, 2], "hidden_sizes": [48, 96], "focal_levels": [2, 2]},
    "mobilevit": {},
}
# Model types that take tokens, with a head that classifies sequences.
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
SIZES |= {"vocab_size": 1000, "pad_token_id": 0}
FEWER_KEYS = {"num_key_value_heads": 2, "head_dim": 16}
TOKENS: dict[str, dict[str, Any]] = dict.fromkeys(
    "bert roberta electra deberta-v2 camembert xlm-roberta mpnet gpt_neox phi".split(), SIZES
)
TOKENS |= dict.fromkeys("llama mistral qwen2 qwen3 gemma gemma2 stablelm".split(), SIZES | FEWER_KEYS)
TOKENS["opt"] = {**SIZES, "word_embed_proj_dim": 64, "ffn_dim": 256}
TOKENS["albert"] = {**SIZES, "embedding_size": 32}
TOKENS["gpt2"] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "pad_token_id": 0}
TOKENS["distilbert"] = {"dim": 64, "hidden_dim": 256, "n_layers": 2, "n_heads": 4, "vocab_size": 1000}
TOKENS["bloom"] = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "pad_token_id": 3}


def names(which: str) -> list[str]:
    """The networks of a list: all of torchvision without video and quantized ones, the smallest of each of timm's
    modules by its name, model types of transformers."""
    if which == "torchvision":
        from torchvision import models

        skipped = ("quantized_", "mc3", "r3d", "r2plus1d", "s3d", "mvit", "swin3d")
        return [name for name in models.list_models() if not name.startswith(skipped)]
    if which == "timm":
        import timm

        chosen = {}
        for module in timm.list_modules():
            if found := timm.list_models(module=module):
                sizes = {name: sum(p.numel() for p in on_meta(name).parameters()) for name in found}
                chosen[module] = min(sizes, key=lambda name: sizes[name])
        return list(dict.fromkeys(chosen.values()))
    return [*TRANSFORMERS, *TOKENS]


def on_meta(name: str) -> nn.Module:
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except Exception:  # Some initialize with numbers.
        return timm.create_model(name)


def build(which: str, name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with settled norms, and an input."""
    torch.manual_seed(0)
    size = 64
    if which == "torchvision":
        from torchvision import models

        detection = name.startswith(("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd"))
        options: dict[str, Any] = {"weights": None, **({"weights_backbone": None} if detection else {})}
        if name.startswith(("deeplab", "fcn", "lraspp")):
            options["weights_backbone"] = None
        model = models.get_model(name, **options)
        size = 299 if name == "inception_v3" else 224
    elif which == "timm":
        import timm

        model = timm.create_model(name)
        size = model.default_cfg["input_size"][-1] if getattr(model, "default_cfg", None) else 224
    else:
        from transformers import (
            AutoConfig,
            AutoModel,
            AutoModelForImageClassification,
            AutoModelForSequenceClassification,
        )

        config = AutoConfig.for_model(name, **{**TRANSFORMERS, **TOKENS}[name])
        if name in TOKENS:
            return AutoModelForSequenceClassification.from_config(config).eval(), torch.randint(5, 90, (2, 16))
        size = getattr(config, "image_size", 224)
        try:
            model = AutoModelForImageClassification.from_config(config)
        except TypeError:  # its type has more parts
            model = AutoModel.from_config(config)
        size = size if isinstance(size, int) else size[-1]
    images = torch.randn(2, 3, size, size)
    settle(model, images)
    return model.eval(), images


def settle(model: nn.Module, images: Tensor) -> None:
    """Give norms statistics of the data and shifts that are not zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    with torch.no_grad(), suppress(Exception):  # Detectors want targets.
        model.train()(images)


def outputs(model: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in tensors_in(model(example))]


def prune(tool: str, model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    if tool == "prunekit":
        import prunekit

        options = {"importance": "magnitude", "pruning_ratio": ratio, "global_pruning": False}
        slim, _ = prunekit.Pruner(model, example, **options).step()
        return slim
    import torch_pruning as tp

    classes = {shape[-1] for shape in outputs(model, example)} | {shape[1] for shape in outputs(model, example)}
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in classes]
    heads = {m: m.num_heads for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)}
    importance, options = tp.importance.GroupMagnitudeImportance(), {"global_pruning": False, "ignored_layers": last}
    pruner = tp.pruner.BasePruner(model, example, importance, pruning_ratio=ratio, num_heads=heads, **options)
    pruner.step()
    return model


def worker(which: str, name: str, tool: str, ratio: float) -> dict[str, Any]:
    model, example = build(which, name)
    before, shapes = sum(p.numel() for p in model.parameters()), outputs(model, example)
    if before > LARGEST:
        return {"status": "too large", "params": before}
    start = time.perf_counter()
    try:
        slim = prune(tool, model, example, ratio)
    except Exception as error:
        return {
            "status": "failed",
            "params": before,
            "reason": f"{type(error).__name__}: {str(error).splitlines()[:1]}",
        }
    seconds = time.perf_counter() - start
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


def reasons_of(model: nn.Module, example: Tensor) -> dict[str, int]:
    import prunekit

    found: dict[str, int] = {}
    for group in prunekit.find_groups(model, example):
        if group.reason and not group.reason.startswith("the model's"):
            found[group.reason] = found.get(group.reason, 0) + group.channels * group.params
    return dict(sorted(found.items(), key=lambda item: -item[1])[:4])


def run(which: str, name: str, tool: str, out: Path, args: argparse.Namespace) -> None:
    if out.is_file():
        return
    command = [sys.executable, __file__, which, "--worker", name, tool, "--ratio", str(args.ratio)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        result = json.loads(last) if last.startswith("{") else {"status": "failed", "reason": done.stderr[-300:]}
    except subprocess.TimeoutExpired:
        result = {"status": "time limit"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"list": which, "name": name, "tool": tool, **result}))
    print(
        f"{which} {name} {tool}: {result['status']} {result.get('gone', 0):.2f} {result.get('reason', '')}", flush=True
    )


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
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network and tool")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"), metavar="DIR")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "TOOL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(worker(args.lists[0], *args.worker, args.ratio)))
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        for which in args.lists:
            for name in names(which):
                for tool in args.tools if name.startswith(tuple(args.only)) else ():
                    pool.submit(run, which, name, tool, args.runs / which / f"{name}-{tool}.json", args)
    results = [json.loads(file.read_text()) for file in sorted(args.runs.glob("*/*.json"))]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows(results)))


if __name__ == "__main__":
    main()
