"""Deep copies of models, and their restoration."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_OWN = frozenset(vars(nn.Module()))
Model = TypeVar("Model", bound=nn.Module)


def copy_module(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """Return ``copy.deepcopy(model, memo)``, in a fraction of its time.

    Each module has a dozen empty collections, most of them of hooks, on which ``deepcopy`` spends most of its time.
    Computed tensors that modules keep, as the old weight_norm does, are copied as they are; ``deepcopy`` refuses them.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in (OrderedDict, dict, set) and not value:
                memo.setdefault(id(value), type(value)())
            elif name not in _OWN and not isinstance(value, int | float | str):
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor) and not leaf.is_leaf:
                        memo.setdefault(id(leaf), leaf.detach().clone())
    return copy.deepcopy(model, memo)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo on exit what forward changes in a model: attributes, modes and buffers."""
    saved = [
        (
            module,
            dict(vars(module)),
            module.training,  # not among the attributes of a scripted module
            {name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attributes, mode, buffers in saved:
                vars(module).clear()
                vars(module).update(attributes)
                module.training = mode
                for name, (buffer, value) in buffers.items():
                    module._buffers[name] = buffer.copy_(value)  # forward may have put another tensor in its place
