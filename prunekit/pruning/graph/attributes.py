"""Numbers that modules keep and that are lengths of axes, such as ``head_dim``."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from torch import nn

from prunekit.pruning.plan import Attribute

CONFIGS = ("config", "cfg")  # what models keep their settings as, such as those of transformers


def lengths_kept_by(name: str, module: nn.Module, lengths: Mapping[int, int]) -> Iterator[Attribute]:
    """Yield the whole numbers that a module or its configuration keeps which are lengths of axes with the group's
    channels."""
    for key, value in _kept_by(module):
        if type(value) is int and value in lengths:
            yield Attribute(module=name, name=key, size=value, lost=lengths[value])
        elif isinstance(value, tuple | list) and type(value) in (tuple, list):
            for index, part in enumerate(value):
                if type(part) is int and part in lengths:
                    yield Attribute(module=name, name=key, index=index, size=part, lost=lengths[part])


def _kept_by(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from vars(module).items()
    for key in CONFIGS:
        config = vars(module).get(key)
        params = getattr(type(config), "__dataclass_params__", None)
        if hasattr(config, "__dict__") and not (params and params.frozen):
            yield from ((f"{key}.{name}", value) for name, value in vars(config).items())


def owner_of(module: nn.Module, name: str) -> tuple[Any, str]:
    """The object that keeps an attribute, and its name there: "config.hidden_size" is kept by the configuration."""
    *path, key = name.split(".")
    return reduce(getattr, path, module), key


def alike_in_other_modules(
    modules: Mapping[str, nn.Module],
    owners: Mapping[str, nn.Module],
    found: Sequence[Attribute],
    chosen: Sequence[Attribute],
) -> list[Attribute]:
    """The attributes like those chosen that some modules of the kind keep; ``owners`` are all modules."""
    taken = {(attribute.module, attribute.name, attribute.index) for attribute in found}
    twins = []
    for name, module in modules.items():
        for attribute in (attribute for attribute in chosen if "." not in attribute.name):
            value = vars(module).get(attribute.name)
            owner = owners[attribute.module]
            same = type(module) is type(owner) and value == vars(owner).get(attribute.name)
            if same and (name, attribute.name, attribute.index) not in taken:
                twins.append(attribute.model_copy(update={"module": name}))
    return twins


def enclosing(module: str) -> list[str]:
    """A module and those that it is in, the innermost first."""
    names = [module]
    while module:
        module = module.rpartition(".")[0]
        names.append(module)
    return names


def running_modules(error: Exception, model: nn.Module) -> list[str]:
    """The modules whose code failed, the innermost first."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found.append(names[owner])
    return list(dict.fromkeys(reversed(found)))
