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

OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
Model = TypeVar("Model", bound=nn.Module)

_ATOMS = frozenset((int, float, bool, str, type(None)))
_COLLECTIONS = (OrderedDict, dict, set, list)
_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__slots__")


def copy_module(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """Return ``copy.deepcopy(model, memo)``, in a fraction of its time.

    Each module has a dozen empty collections, most of them of hooks, and as many numbers, on which ``deepcopy`` spends
    most of its time. Computed tensors that modules keep, as the old weight_norm does, are copied as they are;
    ``deepcopy`` refuses them.
    """
    memo = {} if memo is None else memo
    modules = list(model.modules())
    kinds = {kind for kind in set(map(type, modules)) if _is_plain(kind)}
    plain = {module: type(module).__new__(type(module)) for module in modules if type(module) in kinds}
    memo |= {id(module): copied for module, copied in plain.items() if id(module) not in memo}
    left: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules:
        own = vars(plain[module]) if module in plain else {}
        own |= vars(module)
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value))):
                continue
            if kind in _COLLECTIONS and not value:
                own[name] = memo.setdefault(id(value), kind())
                continue
            if module in plain:
                left.append((own, name, value))
            if name not in OWN_ATTRIBUTES:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor) and not leaf.is_leaf:
                        memo.setdefault(id(leaf), leaf.detach().clone())
    for own, name, value in reversed(left):  # what is inside first, as other classes may look into it
        if name in ("_parameters", "_buffers", "_modules") and type(value) is dict:
            own[name] = {
                key: memo[id(part)] if id(part) in memo else copy.deepcopy(part, memo) for key, part in value.items()
            }
        else:
            own[name] = copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


def _is_plain(kind: type) -> bool:
    """Whether modules of a class are copied as all modules are, attribute by attribute."""
    # PyTorch's own only add what old files lack.
    ours = kind.__setstate__.__module__.startswith("torch.nn.")
    return ours and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _PROTOCOL)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore on exit which modules train; they may differ, as frozen norms do."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
