"""Copies of models for the equivalence check, which share no state with what the user gets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunekit.errors import PlanError
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line

_OWN = frozenset(vars(nn.Module()))


def clone(model: nn.Module) -> nn.Module:
    """Return a deep copy.

    Raises:
        PlanError: the model cannot be copied.
    """
    try:
        return copy_module(model)
    except Exception as error:  # It is the user's code and may raise anything.
        raise PlanError(
            f"the model cannot be copied ({first_line(error)}); copy.deepcopy(model) has to work: remove attributes "
            "such as a lock, a file or a generator"
        ) from error


def copy_as(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in eval mode on the CPU whose tensors of floats, attributes included, have this dtype."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)

    copied = clone(model).cpu().eval()
    copied = copied.double() if dtype == torch.float64 else copied.float()
    for module, name, value in list(_attributes(copied)):
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            vars(module)[name] = tree_map_only(Tensor, cast, value)
    return copied


def drop_caches(model: nn.Module) -> nn.Module:
    """Let modules forget what they keep in eval mode, such as biases by position; they do when they are trained."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode
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
    """Yield what modules keep beside parameters, buffers and modules: (module, name, value)."""
    for module in model.modules():
        yield from ((module, name, value) for name, value in vars(module).items() if name not in _OWN)
