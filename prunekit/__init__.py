"""prunekit: learn how many channels each layer and resolution of a network needs, and rebuild it with just those."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prunekit.config.recipe import load as load_recipe
    from prunekit.config.registry import (
        register_augmentation,
        register_backbone,
        register_dataset,
        register_decay,
        register_importance,
        register_loss,
        register_optimizer,
        register_schedule,
        register_task,
    )
    from prunekit.deployment.bench.variants import profile
    from prunekit.deployment.deploy import deploy
    from prunekit.errors import PrunekitError, PrunekitWarning
    from prunekit.flops import ModelCost, count
    from prunekit.layers import GOctConv
    from prunekit.layers.octavize import octavize
    from prunekit.pipeline.model_file import load, save
    from prunekit.pipeline.runner import run_recipe
    from prunekit.pruning.graph.groups import find_groups
    from prunekit.pruning.graph.rules.base import register_rule
    from prunekit.pruning.plan import Group, Plan
    from prunekit.pruning.pruner import Pruner, PruningReport
    from prunekit.pruning.selection import importance
    from prunekit.pruning.selection.budget import fit_budget, slim_to_budget
    from prunekit.pruning.selection.extract import extract
    from prunekit.pruning.selection.latency_model import LatencyTable
    from prunekit.pruning.sparsity.dynamic_decay import DynamicWeightDecay
    from prunekit.pruning.surgery.equivalence import EquivalenceReport
    from prunekit.pruning.surgery.optimizer_state import slim_optimizer
    from prunekit.pruning.surgery.recalibrate import recalibrate
    from prunekit.pruning.surgery.slim import apply_plan, slim
    from prunekit.reporting import load_run

# fmt: off
__all__ = [
    "DynamicWeightDecay", "EquivalenceReport", "GOctConv", "Group", "LatencyTable", "ModelCost", "Plan",
    "PrunekitError", "PrunekitWarning", "Pruner", "PruningReport", "__version__", "apply_plan", "count", "deploy",
    "extract", "find_groups", "fit_budget", "importance", "load", "load_recipe", "load_run", "octavize", "profile",
    "recalibrate",
    "register_augmentation", "register_backbone", "register_dataset", "register_decay", "register_importance",
    "register_loss", "register_optimizer", "register_rule", "register_schedule", "register_task", "run_recipe", "save",
    "slim", "slim_optimizer", "slim_to_budget",
]
# fmt: on

# Module → the public names in it. Imported at first use, so that `prunekit --help` needs no torch (PEP 562).
_MODULES = {
    "prunekit.config.registry": [name for name in __all__ if name.startswith("register_") and name != "register_rule"],
    "prunekit.deployment.bench.variants": ["profile"],
    "prunekit.deployment.deploy": ["deploy"],
    "prunekit.errors": ["PrunekitError", "PrunekitWarning"],
    "prunekit.flops": ["ModelCost", "count"],
    "prunekit.layers": ["GOctConv"],
    "prunekit.layers.octavize": ["octavize"],
    "prunekit.pipeline.runner": ["run_recipe"],
    "prunekit.pipeline.model_file": ["load", "save"],
    "prunekit.pruning.graph.groups": ["find_groups"],
    "prunekit.pruning.graph.rules.base": ["register_rule"],
    "prunekit.pruning.plan": ["Group", "Plan"],
    "prunekit.pruning.pruner": ["Pruner", "PruningReport"],
    "prunekit.pruning.selection.budget": ["fit_budget", "slim_to_budget"],
    "prunekit.pruning.selection.extract": ["extract"],
    "prunekit.pruning.selection.latency_model": ["LatencyTable"],
    "prunekit.pruning.sparsity.dynamic_decay": ["DynamicWeightDecay"],
    "prunekit.pruning.surgery.equivalence": ["EquivalenceReport"],
    "prunekit.pruning.surgery.optimizer_state": ["slim_optimizer"],
    "prunekit.pruning.surgery.recalibrate": ["recalibrate"],
    "prunekit.pruning.surgery.slim": ["apply_plan", "slim"],
    "prunekit.reporting": ["load_run"],
}
_EXPORTS = {name: (module, name) for module, names in _MODULES.items() for name in names} | {
    "importance": ("prunekit.pruning.selection.importance", None),
    "load_recipe": ("prunekit.config.recipe", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
    module_name, attribute = _EXPORTS[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
