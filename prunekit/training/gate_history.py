"""The gates of a model under training: how many live, and their course."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from prunekit.pruning.graph.gate_expr import effective_gates, gate_scores
from prunekit.pruning.graph.liveness import below_threshold, essential_groups
from prunekit.pruning.plan import Group
from prunekit.utils.text import join_names


class GateHistory:
    """Counts the living channels, and keeps the gates epoch by epoch.

    Where the training shrinks, both are still of the model that it began with; what has been cut stands at zero.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], threshold: float):
        self.threshold = threshold
        self.follow(model, groups)
        self.of = sum(group.channels for group in self.groups)
        self.norms = list(dict.fromkeys(gate.norm for group in self.groups for gate in group.gates))
        self.width = {name: len(model.get_submodule(name).weight) for name in self.norms}
        self.places = {name: np.arange(width) for name, width in self.width.items()}
        self.course: dict[str, list[np.ndarray]] = {name: [] for name in self.norms}
        self._told: set[str] = set()

    def follow(self, model: nn.Module, groups: Sequence[Group], places: Mapping[str, np.ndarray] | None = None) -> None:
        """Look at this model from now on; ``places`` says where what is left of a norm stands in the first one's."""
        self.model = model
        self.groups = [group for group in groups if group.reason is None]
        self.vital = essential_groups(model, self.groups)
        if places is not None:
            self.places = dict(places)

    def count(self) -> tuple[int, int]:
        """Living channels, of all."""
        alive = sum(int((gate_scores(self.model, group) > self.threshold).sum()) for group in self.groups)
        return alive, self.of

    def warning(self) -> str | None:
        """What is to be said of layers that have just lost all of their channels; once of each."""
        found = below_threshold(self.vital, self.threshold, lambda group: gate_scores(self.model, group))
        fresh = [name for name in found if name not in self._told]
        self._told.update(fresh)
        if not fresh:
            return None
        return (
            f"no channel of {join_names(fresh)} is above the threshold {self.threshold:g} any more, the best has "
            f"{max(found[name] for name in fresh):.2g}; if that matters, stop and train with a lower decay.weight, or "
            "leave its norms out in decay.options.exclude"
        )

    def record(self) -> None:
        """Keep the gates as they stand now, as those of one more epoch."""
        for name in self.norms:
            row = np.zeros(self.width[name], np.float32)
            if len(self.places[name]):
                row[self.places[name]] = effective_gates(self.model.get_submodule(name))
            self.course[name].append(row)

    def arrays(self) -> dict[str, np.ndarray]:
        """Norm → (epochs, channels) float32."""
        return {name: np.stack(rows) for name, rows in self.course.items() if rows}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from these ``arrays``."""
        self.course = {name: list(arrays[name]) if name in arrays else [] for name in self.norms}
