"""What computes with channels or parameters off the way that the trace follows, and so forbids to cut them: heads that
are used in training alone, outputs that nobody uses, weights that are read outside of their module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def lock_off_path(model: nn.Module, example: Tensor, known: set[str]) -> list[tuple[str, str]]:
    """(reader, maker): modules that are called but are not on the way to the output, in evaluation or in training, and
    the known modules whose channels they read.

    Args:
        model: a copy, which is run here.
        known: the modules on the way.
    """
    owners = {module: name for name, module in model.named_modules() if any(True for _ in module.parameters(False))}
    if known.issuperset(owners.values()):
        return []
    found: dict[tuple[str, str], None] = {}
    for training in (False, True):
        made: dict[Any, str] = {}
        read: dict[str, list[Any]] = {}

        def see(module: nn.Module, args: Any, named: Any, output: Any, made: Any = made, read: Any = read) -> None:
            name = owners[module]
            if name not in known:
                read.setdefault(name, []).extend(t.grad_fn for t in (*args, *named.values()) if isinstance(t, Tensor))
            elif isinstance(output, Tensor):
                made[output.grad_fn] = name

        hooks = [module.register_forward_hook(see, with_kwargs=True) for module in owners]
        try:
            model.train(training)
            with torch.enable_grad():
                model(example.detach().clone().requires_grad_() * 1.0)
        except Exception:
            continue  # It wants targets in training, say.
        finally:
            for hook in hooks:
                hook.remove()
        for name, stack in read.items():
            found.update(dict.fromkeys((name, maker) for maker in _makers(stack, made)))
    return list(found)


def _makers(stack: list[Any], made: dict[Any, str]) -> set[str]:
    """The nearest known modules from which these tensors come."""
    done, found = set(), set()
    while stack:
        grad_fn = stack.pop()
        if grad_fn is None or grad_fn in done:
            continue
        done.add(grad_fn)
        if grad_fn in made:
            found.add(made[grad_fn])
        else:
            stack.extend(before for before, _ in grad_fn.next_functions)
    return found


def used_elsewhere(ends: set[Any], modules: dict[str, tuple[nn.Module, str, Any]]) -> set[str]:
    """The modules with a parameter that something else than the module itself computes with.

    Args:
        ends: what made the outputs.
        modules: name → the module, its kind of operation and what made its output.
    """
    users: dict[int, list[Any]] = {}
    stack, done = list(ends), set()
    while stack:
        grad_fn = stack.pop()
        if grad_fn is None or grad_fn in done:
            continue
        done.add(grad_fn)
        for before, _ in getattr(grad_fn, "next_functions", ()):
            if hasattr(before, "variable"):
                users.setdefault(id(before.variable), []).append(grad_fn)
            else:
                stack.append(before)
    found = set()
    for name, (module, op, own) in modules.items():
        for parameter in module.parameters(False):
            others = [user for user in users.get(id(parameter), ()) if user is not own]
            # A linear layer turns its weight, and a PReLU views it, before it is used.
            turned = len(others) == 1 and (op, others[0].name()) in (
                ("linear", "TBackward0"),
                ("prelu", "ViewBackward0"),
            )
            if others and not turned:
                found.add(name)
    return found
