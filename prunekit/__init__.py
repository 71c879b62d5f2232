"""prunekit: learn how many channels each layer and resolution of a network needs, and rebuild it with just those."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Name → module. Imported at the first use, so that `prunekit --help` needs no torch (PEP 562).
_EXPORTS = {
    "DynamicWeightDecay": "prunekit.pruning.decay",
    "Group": "prunekit.plan",
    "Plan": "prunekit.plan",
    "Proof": "prunekit.pruning.proof",
    "PrunekitError": "prunekit.errors",
    "PrunekitWarning": "prunekit.errors",
    "apply_plan": "prunekit.pruning.slim",
    "extract": "prunekit.pruning.extract",
    "find_groups": "prunekit.pruning.groups",
    "fit_budget": "prunekit.pruning.budget",
    "load_run": "prunekit.reporting",
    "octavize": "prunekit.layers.octavize",
    "recalibrate": "prunekit.pruning.recalibrate",
    "register_augmentation": "prunekit.registry",
    "register_backbone": "prunekit.registry",
    "register_criterion": "prunekit.registry",
    "register_dataset": "prunekit.registry",
    "register_decay": "prunekit.registry",
    "register_loss": "prunekit.registry",
    "register_optimizer": "prunekit.registry",
    "register_schedule": "prunekit.registry",
    "register_task": "prunekit.registry",
    "slim": "prunekit.pruning.slim",
    "slim_optimizer": "prunekit.pruning.optimizer_state",
    "slim_to_budget": "prunekit.pruning.budget",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
