"""Groups that cannot be pruned because the model's code relies on their number of channels.

The model runs without the first channel of each group, and every operation must give the shape that follows from the
axes. One that does not is named with its line.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunekit.pruning.graph.axes import conv_groups
from prunekit.pruning.graph.axis_terms import Cat, Fixed, Leaf, Prod, Term, leaves, resolve
from prunekit.pruning.graph.recorder import Op, Record
from prunekit.pruning.graph.slicing import slice_model
from prunekit.pruning.plan import Group
from prunekit.utils.copying import copy_module
from prunekit.utils.text import first_line

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))


def lock_fixed_sizes(
    model: nn.Module, record: Record, groups: Mapping[Leaf, Group], rerun: Callable[[nn.Module], Record]
) -> None:
    """Give groups on which the model fails a reason.

    Args:
        model: on the meta device.
        record: of the model, with axes.
        groups: all of them, by their leaves.
        rerun: records a copy of the model; what fails has an attribute ``ops`` with the operations before.
    """
    tried = {
        leaf: group
        for leaf, group in groups.items()
        if group.reason is None
        and group.channels > 1
        and all(conv_groups(model, member.module) == 1 for member in group.members)
    }
    trial = _Trial(model, record, rerun)
    # First without all groups that an operation fails for, then each of those.
    left, suspects = dict(tried), []
    while left and (fault := trial.run(left)) is not None:
        blamed = {leaf: left[leaf] for leaf in fault.leaves if leaf in left} or left
        suspects.append(blamed)
        left = {leaf: group for leaf, group in left.items() if leaf not in blamed}
    while suspects:
        some = suspects.pop()
        fault = trial.run(some)
        if fault is not None and len(some) == 1:
            (group,) = some.values()
            group.reason = f"the code relies on its number of channels: {fault.text}"
        elif fault is not None:
            items = list(some.items())
            suspects += [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]


@dataclass
class _Fault:
    text: str
    leaves: list[Leaf]  # of the operation


@dataclass
class _Trial:
    model: nn.Module
    record: Record
    rerun: Callable[[nn.Module], Record]

    def run(self, groups: Mapping[Leaf, Group]) -> _Fault | None:
        copied = copy_module(self.model)
        slice_model(copied, list(groups.values()), {group.id: {0} for group in groups.values()})
        error = None
        try:
            ops = self.rerun(copied).ops
        except Exception as raised:  # It is the user's code and may raise anything.
            error, ops = raised, getattr(raised, "ops", [])
        cut: set[Leaf] = set(groups)
        for before, after in zip(self.record.ops, ops, strict=False):
            if before.name != after.name:
                return _Fault(f"{after.line} runs {after.name} instead of {before.name}", _leaves(before))
            for old, new in zip(before.outputs, after.outputs, strict=False):
                expected = tuple(_length(term, cut) for term in old.axes)
                if new.shape != expected:
                    text = f"{after.name} ({after.line}) gives {_sides(new.shape)}, not {_sides(expected)}"
                    return _Fault(text, _leaves(before))
        if error is None and len(ops) == len(self.record.ops):
            return None
        failing = self.record.ops[min(len(ops), len(self.record.ops) - 1)]
        text = "it runs other operations" if error is None else f"{_line(error)} fails: {first_line(error)}"
        return _Fault(text, _leaves(failing))


def _sides(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _leaves(op: Op) -> list[Leaf]:
    terms = [term for value in (*op.inputs, *op.outputs) for term in value.axes]
    return list(dict.fromkeys(leaf for term in terms for leaf in leaves(term)))


def _length(term: Term, cut: set[Leaf]) -> int:
    """The length of an axis without one channel of some leaves."""
    term = resolve(term)
    if isinstance(term, Fixed):
        return term.size
    if isinstance(term, Leaf):
        return term.size - (term in cut)
    if isinstance(term, Cat):
        return sum(_length(part, cut) for part in term.parts)
    assert isinstance(term, Prod)
    length = 1
    for factor in term.factors:
        length *= _length(factor, cut)
    return length


def _line(error: Exception) -> str:
    """The line of the user's code that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OWN)] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})"
