"""Isomorphic pruning: only groups of the same structure compete (Fang et al., ECCV 2024).

Scores of different structures, such as the heads of an attention and the hidden channels of an MLP, have other scales.
In place of a score, a channel gets its rank among those of its kind, so that each kind loses the same share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from torch import nn

from prunekit.pruning.plan import Group


def structure(model: nn.Module, group: Group) -> Hashable:
    """What a group consists of: which axes of which tensors of which classes of modules, whatever their sizes."""
    modules = {member.module: type(model.get_submodule(member.module)) for member in group.members}
    return tuple(
        sorted(
            (modules[member.module].__qualname__, member.tensor.rpartition(".")[2], member.axis, member.reads)
            for member in group.members
        )
    )


def rank_within_structures(model: nn.Module, groups: Sequence[Group], scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Replace scores by the share of the channels of their structure whose score is not higher; scores up to 0 stay."""
    members: dict[Hashable, list[np.ndarray]] = defaultdict(list)
    kinds = [structure(model, group) for group in groups]
    for kind, values in zip(kinds, scores, strict=True):
        members[kind].append(values)
    ordered = {kind: np.sort(np.concatenate(values)) for kind, values in members.items()}
    return [
        np.where(
            (values <= 0) | np.isinf(values),
            values,
            np.searchsorted(ordered[kind], values, "right") / len(ordered[kind]),
        )
        for kind, values in zip(kinds, scores, strict=True)
    ]
