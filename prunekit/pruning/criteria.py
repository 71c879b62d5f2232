"""How much each channel matters: scores by which channels are ranked, and the least of them cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from prunekit.plan import Group
from prunekit.pruning.life import scores
from prunekit.registry import register_criterion

# For each batch of training data, the loss of the model that it is called with; the gradient is the caller's business.
Losses = Callable[[nn.Module], Iterable[Tensor]]


@register_criterion("gate")
def gate(model: nn.Module, groups: Sequence[Group], losses: Losses | None = None) -> dict[str, np.ndarray]:
    """The effective gate: how much of a channel its norms leave."""
    return {group.id: scores(model, group) for group in groups if group.reason is None}
