"""The gates of a model during training: how many channels are alive, and the history of gate values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from prunekit.pruning.graph.gate_expr import effective_gates, gate_scores
from prunekit.pruning.graph.liveness import below_threshold, essential_groups
from prunekit.pruning.plan import Group
from prunekit.utils.text import join_names


class GateHistory:
    """Counts living channels and records the gates after each epoch."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], threshold: float):
        self.model, self.threshold = model, threshold
        self.groups = [group for group in groups if group.reason is None]
        self.essential = essential_groups(model, self.groups)
        self.channels = sum(group.channels for group in self.groups)
        self.norms = list(dict.fromkeys(gate.norm for group in self.groups for gate in group.gates))
        self.history: dict[str, list[np.ndarray]] = {name: [] for name in self.norms}
        self._warned: set[str] = set()

    def count(self) -> tuple[int, int]:
        """Return the number of living channels and of all channels."""
        alive = sum(int((gate_scores(self.model, group) > self.threshold).sum()) for group in self.groups)
        return alive, self.channels

    def warning(self) -> str | None:
        """Return a warning about layers that have lost all of their channels since the last call, or None."""
        dead = below_threshold(self.essential, self.threshold, lambda group: gate_scores(self.model, group))
        fresh = [name for name in dead if name not in self._warned]
        self._warned.update(fresh)
        if not fresh:
            return None
        return (
            f"no channel of {join_names(fresh)} is above the threshold {self.threshold:g} any more, the best has "
            f"{max(dead[name] for name in fresh):.2g}; if that matters, stop and train with a lower decay.weight, or "
            "exclude its norms with decay.options.exclude"
        )

    def record(self) -> None:
        """Append the current gates as those of one more epoch."""
        for name in self.norms:
            self.history[name].append(effective_gates(self.model.get_submodule(name)).astype(np.float32))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the recorded gates: name of the norm → float32 (epochs, channels)."""
        return {name: np.stack(rows) for name, rows in self.history.items() if rows}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what :meth:`arrays` returned."""
        self.history = {name: list(arrays[name]) if name in arrays else [] for name in self.norms}
