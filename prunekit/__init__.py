"""prunekit: learn how many channels each layer and resolution of a network needs, and rebuild it with just those."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Name → module. Imported at the first use, so that `prunekit --help` needs no torch (PEP 562).
_EXPORTS = {
    "DynamicWeightDecay": "prunekit.pruning.sparsity.decay",
    "Group": "prunekit.pruning.plan",
    "Plan": "prunekit.pruning.plan",
    "EquivalenceReport": "prunekit.pruning.surgery.equivalence",
    "PrunekitError": "prunekit.errors",
    "PrunekitWarning": "prunekit.errors",
    "apply_plan": "prunekit.pruning.surgery.slim",
    "extract": "prunekit.pruning.selection.extract",
    "find_groups": "prunekit.pruning.graph.groups",
    "fit_budget": "prunekit.pruning.selection.budget",
    "load_run": "prunekit.reporting",
    "octavize": "prunekit.layers.octavize",
    "recalibrate": "prunekit.pruning.surgery.recalibrate",
    "register_augmentation": "prunekit.config.registry",
    "register_backbone": "prunekit.config.registry",
    "register_importance": "prunekit.config.registry",
    "register_dataset": "prunekit.config.registry",
    "register_decay": "prunekit.config.registry",
    "register_loss": "prunekit.config.registry",
    "register_optimizer": "prunekit.config.registry",
    "register_schedule": "prunekit.config.registry",
    "register_task": "prunekit.config.registry",
    "slim": "prunekit.pruning.surgery.slim",
    "slim_optimizer": "prunekit.pruning.surgery.optimizer_state",
    "slim_to_budget": "prunekit.pruning.selection.budget",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
