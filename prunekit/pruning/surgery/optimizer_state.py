"""An optimiser goes along with its model: what it remembers of each parameter is cut as the parameter is."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.cutter import Cutter, slice_tensor
from prunekit.pruning.surgery.make_plan import dead_channels


def slim_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, slim: nn.Module, groups: Sequence[Group], plan: Plan
) -> torch.optim.Optimizer:
    """The optimiser of a slim model, with what the dense model's had gathered (moments, step counts).

    ``slim`` makes a new model, and an optimiser of the dense one would go on training that, without a word. Either make
    a new optimiser of ``slim.parameters()``, or take this one.

    Args:
        optimizer: of the dense model, any of PyTorch's kind; it is left as it is.
        model: the dense model.
        slim: the slim one.
        groups: of the dense model.
        plan: the plan that held (``equivalence.plan``).

    Returns:
        an optimiser of the same class, in the same parameter groups. A bias that slimming has added stands in its
        weight's group, and has no past.

    Raises:
        PlanError: a parameter of the optimiser is not the model's, the slim model is not what the plan makes of it, or
            the optimiser keeps something that has not its parameter's shape (Adafactor, LBFGS).
    """
    masks: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for (name, axis), mask in Cutter(model, groups).masks(dead_channels(groups, plan)).items():
        masks[name][axis] = mask
    names = {parameter: name for name, parameter in model.named_parameters()}
    left = dict(slim.named_parameters())
    kind = type(optimizer).__name__
    if hasattr(optimizer, "_params") or not all(_known(state, p) for p, state in optimizer.state.items()):
        raise PlanError(
            f"{kind} keeps something that cannot be cut with its parameter; make a new one of slim.parameters()"
        )
    made = copy.copy(optimizer)
    made.state, made.param_groups = defaultdict(dict), []
    for held in optimizer.param_groups:
        kept = []
        for parameter in held["params"]:
            if parameter not in names:
                raise PlanError("the optimiser has a parameter that is not the dense model's; give the two that belong")
            name = names[parameter]
            owner, _, own = name.rpartition(".")
            if name in left:  # and its module is not gone
                kept.append(left[name])
                state = _cut(
                    optimizer.state.get(parameter, {}), parameter, model.get_submodule(owner), own, masks[name]
                )
                if any(_alike(value, parameter) and state[key].shape != left[name].shape
                       for key, value in optimizer.state.get(parameter, {}).items()):  # fmt: skip
                    raise PlanError(f"{name} of the slim model is not what the plan makes of it; give equivalence.plan")
                if state:
                    made.state[left[name]] = state
            if own == "weight" and owner in plan.added_bias and f"{owner}.bias" in left:
                kept.append(left[f"{owner}.bias"])
        made.param_groups.append({**held, "params": kept})
    return made


def _cut(
    state: Mapping[str, Any], parameter: Tensor, module: nn.Module, name: str, masks: Mapping[int, np.ndarray]
) -> dict[str, Any]:
    return {
        key: slice_tensor(module, name, value, masks).clone() if _alike(value, parameter) else copy.deepcopy(value)
        for key, value in state.items()
    }


def _known(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether all that is kept of a parameter is for each of its numbers, or one number for it."""
    return all(
        value.shape == parameter.shape or value.numel() == 1 for value in state.values() if isinstance(value, Tensor)
    )


def _alike(value: Any, parameter: Tensor) -> bool:
    """Whether this is kept for each number of the parameter, and not once for it."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
