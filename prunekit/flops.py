"""Parameters, MACs and paper FLOPs of models, modules and layers, and a comparison with other counters.

* MACs: a multiply-add is 1, for one input of the given size. What the operations do counts, whatever calls them:
  convolutions, linear layers, and products of matrices, also of two activations, such as those of attention. Biases,
  norms, activations, products by entry, poolings and sums count 0.
* Paper FLOPs: the convention of the published CSNet (Gao et al., ECCV 2020), always at 224×224: a multiply-add 1; per
  output element a bias 1, upsampling 9, BatchNorm 4, PReLU 3; average pooling 5 per input element; max pooling k² per
  pooled element, where k is the kernel size of the convolution after it. Undefined for other layers.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.layers import GOctConv, layer_of
from prunekit.operations.multiply_adds import MultiplyAdds, multiply_adds, on_shapes
from prunekit.utils.copying import copy_module
from prunekit.utils.inputs import Example, as_example, call, cast, first_inputs, map_tensors
from prunekit.utils.text import si

PAPER_SIZE = (224, 224)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = nn.modules.batchnorm._NormBase

_LayerCosts = dict[tuple[str, int], dict[str, Any]]  # by layer and branch


@dataclass
class Count:
    """Cost of one module; ``paper_flops`` is None where they are undefined."""

    params: int = 0
    macs: int = 0
    paper_flops: int | None = 0


def count_modules(model: nn.Module, example: Sequence[int] | Example) -> tuple[dict[str, Count], list[str]]:
    """Count the cost of each module.

    Args:
        model: not changed.
        example: the shape of one input without the batch, such as (C, H, W), or a batch of inputs as for
            ``find_groups``.

    Returns:
        the counts of all modules with parameters or MACs of their own, by name in the model's order, and the names of
        those that call operations whose MACs are unknown and count as 0. MACs belong to the module that runs.
    """
    leaves = {name: module for name, module in model.named_modules() if not any(True for _ in module.children())}
    defined = _has_paper_flops(model, leaves)
    found = count_operations(model, example)
    macs = found.of_modules()
    paper_flops: dict[str, int] = {}
    if defined:
        one = _one_input(model, example)
        assert isinstance(one, Tensor)
        paper_flops = _paper_flops(model, (one.shape[1], *PAPER_SIZE))
    counts = {}
    # Not only leaves: a module with children may have parameters of its own, and multiply what they return.
    for name, module in model.named_modules():
        params = sum(p.numel() for p in module.parameters(recurse=False))
        if name in macs or any(True for _ in module.parameters(recurse=False)):
            counts[name] = Count(params, macs.get(name, 0), paper_flops.get(name, 0) if defined else None)
    return counts, [name for name, _ in model.named_modules() if name in found.unknown]


def count_operations(model: nn.Module, example: Sequence[int] | Example) -> MultiplyAdds:
    """Count the multiply-adds of each operation; the arguments are those of :func:`count_modules`."""
    return multiply_adds(model, _one_input(model, example))


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model for one input."""

    params: int
    macs: int  # one multiply-add is 1
    paper_flops: int | None  # by the convention of the CSNet paper, always at 224×224; None if undefined
    uncounted: tuple[str, ...] = ()  # modules that call operations whose MACs are unknown; these count as 0

    def __str__(self) -> str:
        parts = [f"{si(self.params)} params", f"{si(self.macs)} MACs"]
        if self.paper_flops is not None:
            parts.append(f"{si(self.paper_flops)} paper FLOPs")
        if self.uncounted:
            parts.append(
                f"without some MACs of {len(self.uncounted)} modules, such as {self.uncounted[0] or 'the model'}"
            )
        return ", ".join(parts)


def count(model: nn.Module, example: Example) -> ModelCost:
    """Count the parameters and the multiply-adds of a model.

    Args:
        model: not changed.
        example: a batch of inputs as for ``find_groups``; the count is for one of them.

    Raises:
        PlanError: the example has no tensor.
    """
    counts, uncounted = count_modules(model, as_example(example))
    return ModelCost(**total(counts), uncounted=tuple(uncounted))


def total(counts: dict[str, Count]) -> dict[str, Any]:
    """Return the sums over all modules; paper FLOPs are None if undefined."""
    paper_flops = [one.paper_flops for one in counts.values()]
    return {
        "params": sum(one.params for one in counts.values()),
        "macs": sum(one.macs for one in counts.values()),
        "paper_flops": sum(filter(None, paper_flops)) if paper_flops and None not in paper_flops else None,
    }


def counters(model: nn.Module, shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Compare with the counters of fvcore, thop and torch.

    Returns:
        "prunekit", "fvcore", "thop", "torch" → {"params", "macs", "modules": {name: MACs}}; torch only has "macs".
    """
    counts, _ = count_modules(model, shape)
    sums = total(counts)
    modules = {name: one.macs for name, one in counts.items()}
    others = {"fvcore": _count_fvcore, "thop": _count_thop, "torch": _count_torch}
    # Copies, since thop adds buffers to the modules.
    return {
        "prunekit": {"params": sums["params"], "macs": sums["macs"], "modules": modules},
        **{name: counter(copy_module(model).eval(), shape) for name, counter in others.items()},
    }


def _layer_rows(costs_of_models: Sequence[_LayerCosts]) -> list[dict[str, Any]]:
    """Return a row for each layer and branch of the dense model, in its order; costs of the slim one may be missing.

    Each row has ``layer``, ``branch`` and, each as {"before", "after"}, channels, params, MACs, paper FLOPs and the
    MACs of fvcore and thop.
    """
    before, *others = costs_of_models
    rows = []
    for (layer, branch), costs in before.items():
        slim_costs = others[0].get((layer, branch), dict.fromkeys(costs, 0)) if others else dict.fromkeys(costs)
        row: dict[str, Any] = {"layer": layer, "branch": branch}
        for key, value in costs.items():
            row[key] = {"before": value, "after": slim_costs[key] if value is not None else None}
        rows.append(row)
    return rows


def layers_table(dense: nn.Module, slim: nn.Module | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the content of ``layers.json``: the rows of layers and branches, and the totals of all counters."""
    models = {side: model for side, model in (("dense", dense), ("slim", slim)) if model is not None}
    counted = {side: counters(model, shape) for side, model in models.items()}
    return {
        "format": 1,
        "size": list(shape[1:]),
        "layers": _layer_rows([_layer_costs(model, shape, counted[side]) for side, model in models.items()]),
        "counters": {
            side: {
                name: {key: value for key, value in one.items() if key != "modules"} for name, one in results.items()
            }
            for side, results in counted.items()
        },
    }


def _layer_costs(model: nn.Module, shape: tuple[int, ...], counted: dict[str, dict[str, Any]]) -> _LayerCosts:
    counts, _ = count_modules(model, shape)
    others = {f"{name}_macs": counted[name]["modules"] for name in ("fvcore", "thop")}
    rows: _LayerCosts = {}
    last: tuple[str, int] | None = None
    for name, one in counts.items():
        module = model.get_submodule(name)
        layer, branch = layer_of(model, name) if name else ("(model)", None)
        starts_layer = isinstance(module, (*_CONVS, nn.ConvTranspose2d, nn.Linear))
        # Outside of multi-scale layers, a norm or an activation belongs to the convolution before it.
        key = (layer, branch) if branch is not None else last if last and not starts_layer else (layer, 0)
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
        channels = getattr(module, "num_features", None) or getattr(module, "out_channels", None)
        row["channels"] = channels or getattr(module, "out_features", None) or row["channels"]
    return rows


def _has_paper_flops(model: nn.Module, leaves: dict[str, nn.Module]) -> bool:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.PReLU, nn.Identity)
    multi_scale = any(isinstance(module, GOctConv) for module in model.modules())
    others = [m for m in model.modules() if not isinstance(m, kinds) and any(True for _ in m.parameters(recurse=False))]
    plain = all(isinstance(m, (*kinds, nn.ModuleDict, nn.ModuleList)) for m in leaves.values())
    return multi_scale and plain and not others


def _paper_flops(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Return the paper FLOPs of each leaf module that a forward calls."""

    def run(runner: nn.Module, batch: Example, context: Callable[[], Any]) -> dict[str, int]:
        flops: dict[str, int] = {}
        names = {module: name for name, module in runner.named_modules()}

        def count_leaf(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                each = module.weight[0].numel() + (module.bias is not None)
            else:
                each = 4 if isinstance(module, _NORMS) else 3 if isinstance(module, nn.PReLU) else 0
            flops[names[module]] = flops.get(names[module], 0) + each * output.numel()

        def count_resizing(module: GOctConv, inputs: tuple[Any, ...], outputs: list[Any]) -> None:
            pooled = set()
            conv: Any
            for key, conv in module.paths.items():
                i, j = map(int, key.split("to"))
                name = names[conv]
                if module.downsample == "pool":
                    if module.stride > 1 and i not in pooled:
                        flops[name] += 5 * inputs[0][i].numel()
                        pooled.add(i)
                    if i < j:
                        flops[name] += conv.in_channels * outputs[j][0, 0].numel() * module.kernel_size**2
                elif module.downsample == "mixed" and i < j:
                    pooled_size = math.prod(-(-side // 2 ** (j - i)) for side in inputs[0][i].shape[2:])
                    flops[name] += conv.in_channels * pooled_size * module.kernel_size**2
                if i > j:
                    flops[name] += 9 * conv.out_channels * outputs[j][0, 0].numel()

        leaves = [module for module in names if not any(True for _ in module.children())]
        hooks = [module.register_forward_hook(count_leaf) for module in leaves]
        hooks += [module.register_forward_hook(count_resizing) for module in names if isinstance(module, GOctConv)]
        try:
            with context():
                call(runner, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return flops

    return on_shapes(model, _one_input(model, shape), run)


def _one_input(model: nn.Module, example: Sequence[int] | Example) -> Example:
    first = next(model.parameters(), torch.empty(0))
    if not isinstance(example, Tensor | Mapping) and all(isinstance(side, int) for side in example):
        return torch.zeros(1, *example, device=first.device, dtype=first.dtype)
    one = map_tensors(lambda tensor: tensor.to(first.device), first_inputs(example, 1))  # type: ignore[arg-type]
    return cast(one, first.dtype)


def _count_fvcore(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    from fvcore.nn import FlopCountAnalysis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, _one_input(model, shape))
        # The operators that fvcore does not support (pooling, sums, upsampling) have no multiply-adds.
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        by_module = analysis.by_module_and_operator()
    kinds = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")
    macs = {name: int(sum(ops.get(kind, 0) for kind in kinds)) for name, ops in by_module.items()}
    return {"params": sum(p.numel() for p in model.parameters()), "macs": macs.pop(""), "modules": macs}


def _count_thop(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    from thop import profile
    from thop.vision.basic_hooks import zero_ops

    # thop counts norms, activations and poolings; it also disables logging.
    uncounted = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU, nn.AdaptiveAvgPool2d)
    logging_level = logging.root.manager.disable
    try:
        macs, params, info = profile(
            model,
            inputs=(_one_input(model, shape),),
            custom_ops=dict.fromkeys(uncounted, zero_ops),
            verbose=False,
            ret_layer_info=True,
        )
    finally:
        logging.disable(logging_level)
    modules: dict[str, int] = {}

    def collect(tree: dict[str, Any], prefix: str) -> None:
        for name, (ops, _, children) in tree.items():
            modules[prefix + name] = int(ops)
            collect(children, f"{prefix}{name}.")

    collect(info, "")
    return {"params": int(params), "macs": int(macs), "modules": modules}


def _count_torch(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model(_one_input(model, shape))
    return {"macs": int(mode.get_total_flops()) // 2}  # torch counts a multiply-add as 2
