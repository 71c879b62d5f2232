"""Parameters, MACs and paper FLOPs, module by module and layer by layer; and what independent counters say.

* MACs: one multiply-add is 1, at the size given, batch 1; convolutions and linear layers. A bias, a norm, an
  activation, a pooling or a sum adds nothing.
* Paper FLOPs: the published CSNet counter's convention, always at 224×224 (Gao et al., ECCV 2020): one multiply-add 1;
  a bias 1 an output element; average-pooling 5 an input element; max-pooling k² a pooled element, k the kernel of the
  convolution that reads it; up-sampling 9, BatchNorm 4 and PReLU 3 an output element. Not defined for networks with
  other layers.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.layers import GOctConv, layer_of

PAPER_SIZE = (224, 224)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass
class Count:
    """What one module costs."""

    params: int = 0
    macs: int = 0
    paper_flops: int | None = 0


def count_modules(model: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, Count], list[str]]:
    """Count a model, module by module.

    Args:
        model: its parameters are not touched.
        shape: of one input without the batch, (C, H, W).

    Returns:
        the count of each module that has parameters of its own, by name, in the model's order; and those of them whose
        MACs are not known (they are not counted as anything).
    """
    leaves = {name: module for name, module in model.named_modules() if not any(True for _ in module.children())}
    defined = _paper_defined(model, leaves)
    # A module that holds others may have parameters of its own beside them.
    found = {
        name: Count(sum(p.numel() for p in module.parameters(recurse=False)), 0, 0 if defined else None)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    macs, _ = _trace(model, leaves, shape)
    for name, value in macs.items():
        found[name].macs = value
    if defined:
        _, paper = _trace(model, leaves, (shape[0], *PAPER_SIZE))
        for name, value in paper.items():
            found[name].paper_flops = value
    known = (*_CONVS, nn.ConvTranspose2d, nn.Linear, _NORMS, nn.PReLU)
    unknown = [name for name in found if not isinstance(model.get_submodule(name), known)]
    return found, unknown


@dataclass(frozen=True)
class ModelCost:
    """What a model costs for one input.

    Attributes:
        params: number of parameters.
        macs: multiply-adds (one multiply-add is 1) of convolutions and linear layers.
        paper_flops: FLOPs by the convention of the CSNet paper, always at 224×224; None where it is not defined.
        uncounted: modules with parameters whose MACs are not known; they count as 0.
    """

    params: int
    macs: int
    paper_flops: int | None
    uncounted: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{_si(self.params)} params", f"{_si(self.macs)} MACs"]
        if self.paper_flops is not None:
            parts.append(f"{_si(self.paper_flops)} paper FLOPs")
        if self.uncounted:
            parts.append(f"without the MACs of {len(self.uncounted)} modules, such as {self.uncounted[0]}")
        return ", ".join(parts)


def count(model: nn.Module, example: Tensor) -> ModelCost:
    """Count the parameters and the multiply-adds of a model.

    Args:
        model: its parameters and modes are left as they are.
        example: a batch of inputs, (N, C, H, W) or (N, C); the count is for one of them.
    """
    counts, unknown = count_modules(model, tuple(example.shape[1:]))
    return ModelCost(**total(counts), uncounted=tuple(unknown))


def _si(value: int) -> str:
    """A number with three digits and an SI prefix: 11_689_512 → "11.7M"."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{prefix}"
    return str(value)


def total(counts: dict[str, Count]) -> dict[str, Any]:
    """Sums over all modules; paper FLOPs are null where they are not defined."""
    paper = [c.paper_flops for c in counts.values() if c.paper_flops is not None]
    return {
        "params": sum(c.params for c in counts.values()),
        "macs": sum(c.macs for c in counts.values()),
        "paper_flops": sum(paper) if paper and len(paper) == len(counts) else None,
    }


def counters(model: nn.Module, shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Our totals beside those of fvcore, thop and torch, for the same input.

    Returns:
        "ours", "fvcore", "thop", "torch" → {"params" (but torch), "macs", "modules": {name: MACs} (but torch)}.
    """
    counts, _ = count_modules(model, shape)
    ours = total(counts)
    return {
        "ours": {
            "params": ours["params"],
            "macs": ours["macs"],
            "modules": {name: c.macs for name, c in counts.items()},
        },
        "fvcore": _fvcore(model, shape),
        "thop": _thop(model, shape),
        "torch": _torch(model, shape),
    }


def layer_rows(dense: nn.Module, slim: nn.Module | None, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row a layer and branch, in the network's order: channels, params, MACs, paper FLOPs, and fvcore's and
    thop's MACs, before and after."""
    sides = [_by_layer(dense, shape), _by_layer(slim, shape) if slim is not None else {}]
    rows = []
    for layer, branch in sides[0]:
        row: dict[str, Any] = {"layer": layer, "branch": branch}
        gone = dict.fromkeys(sides[0][layer, branch], None if slim is None else 0)
        before, after = sides[0][layer, branch], sides[1].get((layer, branch), gone)
        for key, value in before.items():
            row[key] = {"before": value, "after": after[key] if value is not None else None}
        rows.append(row)
    return rows


def layers_table(dense: nn.Module, slim: nn.Module | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """What ``layers.json`` holds: ``layer_rows``, and the totals of all counters for each model."""
    sides = {"dense": dense, "slim": slim}
    return {
        "format": 1,
        "size": list(shape[1:]),
        "layers": layer_rows(dense, slim, shape),
        "counters": {
            side: {
                name: {key: value for key, value in one.items() if key != "modules"}
                for name, one in counters(model, shape).items()
            }
            for side, model in sides.items()
            if model is not None
        },
    }


def _by_layer(model: nn.Module, shape: tuple[int, ...]) -> dict[tuple[str, int], dict[str, Any]]:
    counts, _ = count_modules(model, shape)
    others = {"fvcore_macs": _fvcore(model, shape)["modules"], "thop_macs": _thop(model, shape)["modules"]}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    last: tuple[str, int] | None = None
    for name, one in counts.items():
        module = model.get_submodule(name)
        layer, branch = layer_of(model, name) if name else ("(model)", None)
        maker = isinstance(module, (*_CONVS, nn.ConvTranspose2d, nn.Linear))
        # Outside of multi-scale layers, a norm or an activation belongs to the convolution before it.
        key = (layer, branch) if branch is not None else last if last and not maker else (layer, 0)
        last = key if branch is None else None
        row = rows.setdefault(
            key, {"channels": 0, "params": 0, "macs": 0, "paper_flops": 0, "fvcore_macs": 0, "thop_macs": 0}
        )
        row["params"] += one.params
        row["macs"] += one.macs
        row["paper_flops"] = (
            None if one.paper_flops is None or row["paper_flops"] is None else (row["paper_flops"] + one.paper_flops)
        )
        for counter, modules in others.items():
            row[counter] += modules.get(name, 0)
        width = getattr(module, "num_features", None) or getattr(module, "out_channels", None)
        row["channels"] = width or getattr(module, "out_features", None) or row["channels"]
    return rows


def _paper_defined(model: nn.Module, leaves: dict[str, nn.Module]) -> bool:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.PReLU, nn.Identity)
    multi = any(isinstance(module, GOctConv) for module in model.modules())
    empty = [m for m in model.modules() if not isinstance(m, kinds) and any(True for _ in m.parameters(recurse=False))]
    plain = all(isinstance(m, (*kinds, nn.ModuleDict, nn.ModuleList)) for m in leaves.values())
    return multi and plain and not empty


@torch.no_grad()
def _trace(
    model: nn.Module, leaves: dict[str, nn.Module], shape: tuple[int, ...]
) -> tuple[dict[str, int], dict[str, int]]:
    """MACs and paper FLOPs of each leaf module that is called."""
    macs: dict[str, int] = {}
    paper: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def leaf(module: nn.Module, _: Any, output: Tensor) -> None:
        name = names[module]
        if isinstance(module, (*_CONVS, nn.Linear)):
            done = output.numel() * (module.weight.numel() // module.weight.shape[0])
            macs[name] = macs.get(name, 0) + done
            paper[name] = paper.get(name, 0) + done + (output.numel() if module.bias is not None else 0)
        elif isinstance(module, nn.ConvTranspose2d):
            # Every input element meets the whole kernel of each output channel of its group.
            done = _[0].numel() * module.weight.shape[1] * module.weight[0, 0].numel()
            macs[name] = macs.get(name, 0) + done
        elif isinstance(module, _NORMS):
            paper[name] = paper.get(name, 0) + 4 * output.numel()
        elif isinstance(module, nn.PReLU):
            paper[name] = paper.get(name, 0) + 3 * output.numel()

    def multi(module: Any, args: tuple[Any, ...], outputs: list[Any]) -> None:
        pooled = set()
        for key, conv in module.paths.items():
            i, j = map(int, key.split("to"))
            name = names[conv]
            if module.downsample == "pool":
                if module.stride > 1 and i not in pooled:
                    paper[name] += 5 * args[0][i].numel()
                    pooled.add(i)
                if i < j:
                    paper[name] += conv.in_channels * outputs[j][0, 0].numel() * module.kernel_size**2
            elif module.downsample == "mixed" and i < j:
                pooled_size = math.prod(-(-side // 2 ** (j - i)) for side in args[0][i].shape[2:])
                paper[name] += conv.in_channels * pooled_size * module.kernel_size**2
            if i > j:
                paper[name] += 9 * conv.out_channels * outputs[j][0, 0].numel()

    hooks = [m.register_forward_hook(leaf) for m in leaves.values()]
    hooks += [m.register_forward_hook(multi) for m in model.modules() if isinstance(m, GOctConv)]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(_input(model, shape))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return macs, paper


def _input(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    first = next(model.parameters())
    return torch.zeros(1, *shape, device=first.device, dtype=first.dtype)


def _fvcore(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    from fvcore.nn import FlopCountAnalysis

    model = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, _input(model, shape))
        # Operators that it cannot count are poolings, sums and up-samplings: no multiply-adds.
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_module = analysis.by_module_and_operator()
    kinds = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")
    macs = {name: int(sum(ops.get(kind, 0) for kind in kinds)) for name, ops in by_module.items()}
    return {"params": sum(p.numel() for p in model.parameters()), "macs": macs.pop(""), "modules": macs}


def _thop(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    # It writes into the modules that it counts.
    model = copy.deepcopy(model).eval()
    from thop import profile
    from thop.vision.basic_hooks import zero_ops

    kept = logging.root.manager.disable
    try:
        # Norms, activations and poolings are set to nothing: those are no multiply-adds.
        free = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU, nn.AdaptiveAvgPool2d)
        macs, params, info = profile(
            model,
            inputs=(_input(model, shape),),
            custom_ops=dict.fromkeys(free, zero_ops),
            verbose=False,
            ret_layer_info=True,
        )
    finally:
        logging.disable(kept)
    modules: dict[str, int] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for name, (ops, _, below) in tree.items():
            modules[prefix + name] = int(ops)
            walk(below, f"{prefix}{name}.")

    walk(info, "")
    return {"params": int(params), "macs": int(macs), "modules": modules}


def _torch(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model(_input(model, shape))
    # It counts a multiply-add as two operations.
    return {"macs": int(mode.get_total_flops()) // 2}
