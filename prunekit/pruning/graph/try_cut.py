"""Groups that cannot be pruned because the model's code relies on their number of channels."""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit.pruning.graph.axes import CONVS, TRANSPOSED, conv_groups, output_axis
from prunekit.pruning.graph.meta import FastShapes, to_meta
from prunekit.pruning.graph.trace import tensors_in
from prunekit.pruning.plan import Group
from prunekit.utils.text import first_line

_OWN = str(Path(torch.__file__).parent)


def lock_fixed_sizes(model: nn.Module, groups: Sequence[Group], example: Tensor) -> None:
    """Try the cut of each group's first channel on the meta device; give groups on which the model fails a reason."""
    candidates = [
        group
        for group in groups
        if group.reason is None
        and group.channels > 1
        and all(conv_groups(model, member.module) == 1 for member in group.members)
    ]
    try:
        shapes = _shapes(to_meta(model), example)
    except Exception:  # It reads values; the equivalence check decides.
        return
    pending = [candidates] if candidates else []
    while pending:
        tried = pending.pop()
        try:
            fault = None if _shapes(_cut(model, tried), example) == shapes else "its output has another shape"
        except Exception as error:  # It is the user's code and may raise anything.
            fault = f"{_line(error)} fails: {first_line(error)}"
        if fault is not None and len(tried) == 1:
            tried[0].reason = f"the code relies on its number of channels: {fault}"
        elif fault is not None:
            pending += [tried[: len(tried) // 2], tried[len(tried) // 2 :]]


def _shapes(model: nn.Module, example: Tensor) -> list[torch.Size]:
    with torch.no_grad(), FastShapes():
        return [tensor.shape for tensor in tensors_in(model.eval()(example.detach().to("meta")))]


def _cut(model: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """Return a copy on the meta device without the first channel of each group."""
    copied = to_meta(model)
    lost: dict[tuple[str, int], int] = defaultdict(int)
    for group in groups:
        for member in group.members:
            lost[member.tensor, member.axis] += member.stride
    for (tensor, axis), count in lost.items():
        module, name = copied.get_submodule(tensor.rpartition(".")[0]), tensor.rpartition(".")[2]
        old = getattr(module, name)
        new = old.narrow(axis, 0, old.shape[axis] - count).detach()
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for name in {tensor.rpartition(".")[0] for tensor, _ in lost}:
        module = copied.get_submodule(name)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, CONVS + TRANSPOSED):
            module.groups = len(module.weight) if module.groups > 1 else 1  # depthwise, or not grouped
            out, sides = output_axis(module), module.weight.shape
            module.out_channels, module.in_channels = sides[out], sides[1 - out] * module.groups
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
        elif getattr(module, "num_features", None):
            module.num_features = len(module.weight if module.affine else module.running_mean)
    return copied


def _line(error: Exception) -> str:
    """The line of the user's code that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_OWN, str(Path(__file__).parents[2])))] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})"
