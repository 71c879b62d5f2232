"""Copies of models for the equivalence check, which share no state with what the user gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunekit.errors import PlanError
from prunekit.utils.copying import OWN_ATTRIBUTES, copy_module, kept_modes
from prunekit.utils.text import first_line


def clone(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy.

    Args:
        memo: copies that are made already, by the id of what they are of.

    Raises:
        PlanError: the model cannot be copied.
    """
    try:
        return copy_module(model, dict(memo or {}))
    except Exception as error:  # It is the user's code and may raise anything.
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); copy.deepcopy(model) has to work: remove attributes "
            "such as a lock, a file or a generator"
        ) from error


def copy_as(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in eval mode on the CPU whose tensors of floats, attributes included, have this dtype."""
    # Parameters and buffers are converted as they are copied, which takes half the time and memory.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if type(tensor) is nn.Parameter:
                memo.setdefault(id(tensor), nn.Parameter(_converted(tensor.detach(), dtype), tensor.requires_grad))
        for tensor in module._buffers.values():
            if type(tensor) is Tensor:
                memo.setdefault(id(tensor), _converted(tensor.detach(), dtype))
    return convert(clone(model, memo), dtype)


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change a model, in place, to one in eval mode on the CPU whose tensors of floats have this dtype."""
    model = model.eval()
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" or (t.is_floating_point() and t.dtype != dtype) for t in tensors):
        model = model.cpu()
        model = model.double() if dtype == torch.float64 else model.float()
    for module, name, value in list(_attributes(model)):
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            vars(module)[name] = tree_map_only(Tensor, lambda tensor: _converted(tensor, dtype, copy=False), value)
    return model


def _converted(tensor: Tensor, dtype: torch.dtype, copy: bool = True) -> Tensor:
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=copy)


def drop_caches(model: nn.Module) -> nn.Module:
    """Let modules forget what they keep in eval mode, such as biases by position; they do when they are trained."""
    with kept_modes(model):
        model.train()
    return model


def transfer(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters and the statistics of norms from a model to another of the same shapes.

    The target keeps its dtypes, devices and layouts, and its other buffers, which the check may have changed.
    """
    values = dict(source.named_parameters())
    values |= {n: b for n, b in source.named_buffers() if n.rpartition(".")[2] in ("running_mean", "running_var")}
    for name, tensor in (*target.named_parameters(), *target.named_buffers()):
        if name in values:
            tensor.data.copy_(values[name].detach())


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """Yield what modules keep beside parameters, buffers, modules and numbers: (module, name, value)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in OWN_ATTRIBUTES and not isinstance(value, int | float | str | None):
                yield module, name, value
