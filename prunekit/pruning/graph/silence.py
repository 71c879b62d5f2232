"""The parameters that a channel without gates emits zero by: with all of them at zero, nothing of it is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.pruning.plan import Group, Span


@dataclass
class Rows:
    """The entries of a parameter's axis that belong to the channels of a group."""

    tensor: str
    parameter: nn.Parameter
    span: Span

    @property
    def axis(self) -> int:
        return self.span.axis

    def of(self, channels: np.ndarray) -> Tensor:
        """The entries of some channels, those of one channel after another."""
        return torch.from_numpy(self.span.entries(channels)).to(self.parameter.device)


def silencing_rows(model: nn.Module, group: Group) -> Iterator[Rows]:
    """Yield what has to be zero for a channel of a group to be zero: of the modules that produce its channels or pass
    them on, all parameters but the slopes of PReLUs. Biases come first."""
    members = [member for member in group.members if not member.reads]
    for member in sorted(members, key=lambda member: not member.tensor.endswith(".bias")):
        module = model.get_submodule(member.module)
        parameter = module._parameters.get(member.tensor.rpartition(".")[2])
        if parameter is not None and not isinstance(module, nn.PReLU):
            yield Rows(member.tensor, parameter, member)


def silent_channels(model: nn.Module, group: Group) -> np.ndarray:
    """Return which channels of a group are zero whatever the input, (channels,) bool, as far as parameters say."""
    silent = np.arange(group.channels)
    for rows in silencing_rows(model, group):
        if not len(silent):
            break
        other = [axis for axis in range(rows.parameter.dim()) if axis != rows.axis]
        entries = rows.parameter.detach().index_select(rows.axis, rows.of(silent)) != 0
        used = (entries.any(dim=other) if other else entries).view(-1, rows.span.times).any(1)
        silent = silent[~used.cpu().numpy()]
    mask = np.zeros(group.channels, bool)
    mask[silent] = True
    return mask


def silence(model: nn.Module, group: Group, dead: np.ndarray) -> None:
    """Set everything to zero, in place, that channels of a group emit something by."""
    with torch.no_grad():
        for rows in silencing_rows(model, group):
            rows.parameter.index_fill_(rows.axis, rows.of(dead), 0.0)
