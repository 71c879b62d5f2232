"""Uses of channels and parameters that the trace from input to output does not follow, and that forbid pruning them.

Examples: auxiliary heads that run in training only, outputs that nothing uses, weights that are read outside of their
module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.pruning.graph.meta import FastShapes


def off_path_readers(model: nn.Module, example: Tensor, on_path: set[str]) -> list[tuple[str, str]]:
    """Find modules that are called in eval or train mode but are not on the path from input to output.

    Returns:
        pairs (off-path module, the on-path module whose channels it reads).
    """
    # A single number acts on all channels equally.
    owners = {
        module: name
        for name, module in model.named_modules()
        if any(parameter.numel() > 1 for parameter in module.parameters(False))
    }
    if on_path.issuperset(owners.values()):
        return []
    found: dict[tuple[str, str], None] = {}
    for training in (False, True):
        producers: dict[Any, str] = {}
        reads: dict[str, list[Any]] = {}

        def record(
            module: nn.Module, args: Any, kwargs: Any, output: Any, producers: Any = producers, reads: Any = reads
        ) -> None:
            name = owners[module]
            if name not in on_path:
                inputs = (*args, *kwargs.values())
                reads.setdefault(name, []).extend(t.grad_fn for t in inputs if isinstance(t, Tensor))
            elif isinstance(output, Tensor):
                producers[output.grad_fn] = name

        hooks = [module.register_forward_hook(record, with_kwargs=True) for module in owners]
        try:
            model.train(training)
            with torch.enable_grad(), FastShapes():
                model(example.detach().clone().requires_grad_() * 1.0)
        except Exception:
            continue  # For example, a model that needs targets in train mode.
        finally:
            for hook in hooks:
                hook.remove()
        for name, grad_fns in reads.items():
            nearest = {producers[g] for g in _ancestors(grad_fns, stop=producers) if g in producers}
            found.update(dict.fromkeys((name, producer) for producer in nearest))
    return list(found)


def used_elsewhere(ends: Collection[Any], modules: dict[str, tuple[nn.Module, str, set[Any]]], whole: bool) -> set[str]:
    """Return the modules with a parameter that something other than the module itself computes with.

    Args:
        ends: the autograd nodes of the model's outputs.
        modules: name → (module, kind of operation, autograd nodes of its outputs).
        whole: whether a linear layer is one autograd node.
    """
    users: dict[int, list[Any]] = {}
    for grad_fn in _ancestors(ends):
        for before, _ in grad_fn.next_functions:
            if hasattr(before, "variable"):
                users.setdefault(id(before.variable), []).append(grad_fn)
    found = set()
    for name, (module, op, calls) in modules.items():
        for parameter in module.parameters(False):
            others = [user for user in users.get(id(parameter), ()) if user not in calls]
            # A PReLU reshapes its weight before use, and a linear layer that is not one node transposes it.
            usual = {("prelu", "ViewBackward0"), *([] if whole else [("linear", "TBackward0")])}
            own = len(others) <= len(calls) and {(op, other.name()) for other in others} <= usual
            if others and not own:
                found.add(name)
    return found


def _ancestors(grad_fns: Iterable[Any], stop: Collection[Any] = ()) -> Iterator[Any]:
    """Yield the autograd nodes that these depend on, themselves included, without those beyond a node in ``stop``."""
    stack, seen = list(grad_fns), set()
    while stack:
        grad_fn = stack.pop()
        if grad_fn is None or grad_fn in seen:
            continue
        seen.add(grad_fn)
        yield grad_fn
        if grad_fn not in stop:
            stack.extend(before for before, _ in grad_fn.next_functions)
