"""The optimizer of a slim model: its state is sliced like the parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.pruning.graph.slicing import slice_tensor
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.plan_builder import dead_channels
from prunekit.utils.compiled import unwrap


def slim_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, slim: nn.Module, groups: Sequence[Group], plan: Plan
) -> torch.optim.Optimizer:
    """Return an optimizer of a slim model with the state (moments, step counts) of the dense model's optimizer.

    Args:
        optimizer: of the dense model, which does not train the slim one; it is left unchanged.
        model: the dense model.
        slim: the slim model.
        groups: of the dense model.
        plan: the plan of the slim model (``EquivalenceReport.plan``).

    Returns:
        One of the same class and parameter groups; an added bias is in the group of its weight, without state.

    Raises:
        PlanError: a parameter of the optimizer is not the model's, the slim model does not fit the plan, or the
            optimizer has state that does not have its parameter's shape (Adafactor, LBFGS).
    """
    if hasattr(optimizer, "_params") or not all(
        value.numel() == 1 or value.shape == parameter.shape
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor)
    ):
        raise PlanError(
            f"{type(optimizer).__name__} has state that cannot be sliced; make a new one of slim.parameters()"
        )
    model, slim = unwrap(model), unwrap(slim)
    masks: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for (name, axis), mask in Cutter(model, groups).masks(dead_channels(groups, plan)).items():
        masks[name][axis] = mask
    names = {parameter: name for name, parameter in model.named_parameters()}
    slim_parameters = dict(slim.named_parameters())
    result = copy.copy(optimizer)
    result.state, result.param_groups = defaultdict(dict), []
    for param_group in optimizer.param_groups:
        params = []
        for parameter in param_group["params"]:
            if parameter not in names:
                raise PlanError("a parameter of the optimizer is not the dense model's; pass that model's optimizer")
            name = names[parameter]
            owner, _, key = name.rpartition(".")
            if name in slim_parameters:
                new = slim_parameters[name]
                params.append(new)
                for entry, value in optimizer.state.get(parameter, {}).items():
                    result.state[new][entry] = copy.deepcopy(value)
                    if _is_elementwise(value, parameter):
                        sliced = slice_tensor(model.get_submodule(owner), key, value, masks[name]).clone()
                        if sliced.shape != new.shape:
                            raise PlanError(f"{name} of the slim model does not fit the plan; pass report.plan")
                        result.state[new][entry] = sliced
            if key == "weight" and owner in plan.added_bias and f"{owner}.bias" in slim_parameters:
                params.append(slim_parameters[f"{owner}.bias"])
        result.param_groups.append({**param_group, "params": params})
    return result


def _is_elementwise(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
