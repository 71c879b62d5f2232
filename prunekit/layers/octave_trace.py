"""Traces the forward of a model with torch.fx into a list of calls with their output shapes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunekit.errors import PlanError
from prunekit.layers.octave_ops import Ref, Training, map_leaves, refs
from prunekit.utils.text import first_line

ROOT = "model"


@dataclass
class Call:
    """One node of the trace.

    Arguments have a ``Ref`` for the value of another call, and ``Training()`` for a flag that follows the mode.
    """

    index: int
    kind: str  # "input", "module", "function", "method", "attr" or "output"
    target: Any  # the name of a module, a method or an attribute, or a function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str  # the name in reports: that of the module, or of the enclosing module and the node
    shape: tuple[int, ...] | None = None  # of the value, if it is a tensor
    users: list[int] = field(default_factory=list)
    value: Tensor | None = None  # a constant tensor that the forward creates

    @property
    def inputs(self) -> list[int]:
        return sorted(refs((self.args, self.kwargs)))


class _SingleInput(nn.Module):
    """The model as a function of one tensor; other arguments of its forward keep their defaults."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.add_module(ROOT, model)

    def forward(self, image: Tensor) -> Any:
        return self.model(image)


class _Tracer(fx.Tracer):
    def __init__(self, keep: Sequence[str]):
        super().__init__()
        self.keep = keep

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kept(_own(module_qualified_name), self.keep) or super().is_leaf_module(m, module_qualified_name)


def kept(name: str, keep: Sequence[str]) -> bool:
    """Return whether a shell pattern in ``keep`` matches the module name."""
    return any(fnmatchcase(name, pattern) for pattern in keep)


def trace(model: nn.Module, example: Tensor, keep: Sequence[str]) -> list[Call]:
    """Return the calls of ``model`` on ``example`` in order: first the input, last the output. Raises PlanError."""
    model = copy.deepcopy(model)
    _, trained = _graph(model.train(), keep)
    root, evaluated = _graph(model.eval(), keep)
    shapes = _check(root, evaluated, example)
    order = {node: index for index, node in enumerate(evaluated.nodes)}
    other = list(trained.nodes)
    if [(n.op, n.target) for n in order] != [(n.op, n.target) for n in other]:
        odd = next((n for n, m in zip(order, other, strict=False) if (n.op, n.target) != (m.op, m.target)), other[-1])
        raise _trace_error(f"train and eval mode call different operations at {_label(odd)}")
    twins = {twin: index for index, twin in enumerate(other)}
    calls = []
    for (node, index), twin in zip(order.items(), other, strict=True):
        args, kwargs = (
            _merge(_with_refs(a, order), _with_refs(b, twins), _label(node))
            for a, b in ((node.args, twin.args), (node.kwargs, twin.kwargs))
        )
        kind = {"placeholder": "input", "get_attr": "attr"}.get(node.op, node.op.removeprefix("call_"))
        target = _own(node.target) if kind in ("module", "attr") else node.target
        made = getattr(root, node.target) if kind == "attr" and "." not in node.target else None
        calls.append(Call(index, kind, target, tuple(args), kwargs, _label(node), shapes.get(node), value=made))
    for call in calls:
        for index in call.inputs:
            calls[index].users.append(call.index)
    return calls


class Shapes(fx.Interpreter):
    """Runs a graph and records the shape of each tensor value."""

    def __init__(self, root: nn.Module, graph: fx.Graph | None = None):
        super().__init__(root, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _graph(model: nn.Module, keep: Sequence[str]) -> tuple[nn.Module, fx.Graph]:
    root = _SingleInput(model)
    root.training = model.training
    try:
        return root, _Tracer(keep).trace(root)
    except Exception as error:  # User code may raise anything.
        raise _trace_error(first_line(error)) from error


def _trace_error(why: str) -> PlanError:
    return PlanError(
        f"torch.fx cannot trace the model: {why}; list the module that does this in keep=[…] to leave it unchanged"
    )


def _check(root: nn.Module, graph: fx.Graph, example: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Return the output shape of each node; raise if the graph and the model compute different outputs."""
    run = Shapes(root, graph)
    try:
        with torch.no_grad():
            wanted = root(example.clone())  # it may change its input
    except Exception as error:
        raise PlanError(f"the model fails on an input of shape {tuple(example.shape)}: {first_line(error)}") from error
    try:
        with torch.no_grad():
            torch.testing.assert_close(run.run(example.clone()), wanted, equal_nan=True)
    except Exception as error:
        raise _trace_error(f"the traced graph computes a different output ({first_line(error)})") from error
    return run.shapes


def _with_refs(item: Any, order: dict[fx.Node, int]) -> Any:
    return map_leaves(item, lambda leaf: Ref(order[leaf]) if isinstance(leaf, fx.Node) else leaf)


def _merge(evaluated: Any, trained: Any, label: str) -> Any:
    """Return the arguments that both modes pass; ``Training()`` where eval passes False and train True."""
    if isinstance(evaluated, dict):
        return {key: _merge(part, trained.get(key), label) for key, part in evaluated.items()}
    if type(evaluated) in (tuple, list) and isinstance(trained, tuple | list) and len(evaluated) == len(trained):
        return type(evaluated)(_merge(a, b, label) for a, b in zip(evaluated, trained, strict=True))
    if (evaluated, trained) == (False, True) and isinstance(trained, bool):
        return Training()
    if evaluated is trained or evaluated == trained or evaluated != evaluated:
        return evaluated
    raise _trace_error(f"{label} gets {trained} in train mode and {evaluated} in eval mode")


def _own(name: str) -> str:
    return name.removeprefix(ROOT).removeprefix(".")


def _label(node: fx.Node) -> str:
    if node.op in ("call_module", "get_attr"):
        return _own(node.target)
    place = next(reversed(node.meta.get("nn_module_stack") or [""]))
    return f"{_own(place)}.{node.name.removeprefix(ROOT + '_')}".removeprefix(".")
