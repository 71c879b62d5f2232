"""Cutting dead channels with their responses replaced, and the masked dense model that the result is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.pruning.graph.axes import TRANSPOSED
from prunekit.pruning.graph.slicing import channel_index
from prunekit.pruning.plan import Group, Plan
from prunekit.pruning.surgery.constant_folding import Constants, Folding, apply_folding, plan_folding, zero_inputs
from prunekit.pruning.surgery.copies import clone, drop_caches
from prunekit.pruning.surgery.cutter import Cutter
from prunekit.pruning.surgery.plan_builder import plan_from_dead

CONVOLUTIONS = {3: (F.conv1d, F.conv_transpose1d), 4: (F.conv2d, F.conv_transpose2d), 5: (F.conv3d, F.conv_transpose3d)}


def rebuild(
    model: nn.Module, groups: Sequence[Group], dead: Mapping[str, set[int]], constants: Constants, carry: bool = False
) -> tuple[Plan, Folding]:
    """Cut dead channels in place and replace their responses, without an equivalence check.

    Args:
        model: in eval mode; becomes the slim model.
        groups: of that model.
        dead: by group, from ``Cutter.complete``.
        constants: that replace the responses, from ``measure_constants`` of this model.
        carry: keep dead channels that carry constants to readers that pad; their gates must be zero.
    """
    cutter, folding = Cutter(model, groups), plan_folding(constants, carry)
    cut = {name: set(channels) - set(folding.carriers.get(name, ())) for name, channels in dead.items()}
    # A carrier keeps its group, but not what depends on the group, nor the balance of grouped convolutions.
    completed, removed = cutter.complete(cut)
    biases = apply_folding(model, folding, removed)
    unread = {name: channels - completed[name] for name, channels in cut.items()}
    zero_inputs(model, groups, unread)
    folding.unread = sum(map(len, unread.values()))
    plan = plan_from_dead(model, groups, completed, removed)
    plan.added_bias, plan.carriers = cutter.cut(model, completed, removed, biases), folding.carriers
    drop_caches(model)  # of the dense model, which has run
    return plan, folding


def mask_responses(
    model: nn.Module,
    groups: Sequence[Group],
    dead: Mapping[str, set[int]],
    constants: Constants,
    removed: Sequence[str],
) -> nn.Module:
    """Return a copy of a dense model whose readers see a constant instead of each dead channel.

    The weights that read dead channels are zero; what the constant adds to the interior of an output is in the bias.

    Args:
        model: in eval mode.
        groups: of that model.
        dead: by group, from ``Cutter.complete``.
        constants: from ``measure_constants``.
        removed: modules that the slim model lacks; where no norm follows one, its output is zero.
    """
    masked = clone(model).eval()
    zero_inputs(masked, groups, dead)
    values: dict[str, np.ndarray] = {}
    for group in groups:
        for member in group.readers if dead.get(group.id) and not group.zeroed else ():
            index = member.entries(channel_index(dead[group.id]))
            means = constants.means.get(member.module)
            if member.module in removed and member.next_norm is None:
                masked.get_submodule(member.module).bias = None
            elif means is not None:
                values.setdefault(member.module, np.zeros_like(means))[index] = means[index]
    for name, value in values.items():
        module = masked.get_submodule(name)
        if value.any():
            shift = _interior_response(model.get_submodule(name), value)
            module.bias = nn.Parameter(shift if module.bias is None else module.bias.data + shift)
    return masked


def _interior_response(module: nn.Module, value: np.ndarray) -> Tensor:
    """What a reader makes of a constant input away from the border, on average over positions, without its bias."""
    weight = module.weight.data
    constant = torch.from_numpy(value).to(weight)
    if weight.dim() == 2:
        return F.linear(constant, weight)
    ones = [1] * (weight.dim() - 2)
    reach = [d * (k - 1) for d, k in zip(module.dilation, weight.shape[2:], strict=True)]
    convolution, transposed = CONVOLUTIONS[weight.dim()]
    if not isinstance(module, TRANSPOSED):
        image = constant.view(1, -1, *ones).expand(1, -1, *(r + 1 for r in reach))
        return convolution(image, weight, dilation=module.dilation, groups=module.groups).flatten()
    sides = [r // s + 2 for r, s in zip(reach, module.stride, strict=True)]
    image = constant.view(1, -1, *ones).expand(1, -1, *sides)
    output = transposed(image, weight, None, module.stride, 0, 0, module.groups, module.dilation)
    # One period of the pattern, where the whole kernel contributes.
    inside = [slice(r, r + s) for r, s in zip(reach, module.stride, strict=True)]
    return output[0][:, *inside].flatten(1).mean(1)
