"""Optimizers, with parameter groups for gates and for parameters that are stored scaled.

A backbone may store a parameter ``s`` times as large as it is used (``step_scales``). To train as if it were stored
unscaled, its learning rate, ε and weight decay follow from s:

=======  ==========  =====  ============
rule     rate        ε      weight decay
=======  ==========  =====  ============
adam     × s         ÷ s    ÷ s²
adamw    × s         ÷ s    ÷ s
sgd      × s²               ÷ s²
=======  ==========  =====  ============
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit.config.registry import register_optimizer


@dataclass
class ParamGroup:
    """Parameters that share their settings.

    Attributes:
        lr: learning rate of the unscaled parameters.
        scale: factor by which they are stored larger.
        weight_decay: whether the optimizer's weight decay applies.
    """

    params: list[nn.Parameter]
    lr: float
    scale: float = 1.0
    weight_decay: bool = True

    def settings(self, weight_decay: float, rate_power: int, decay_power: int) -> dict[str, Any]:
        """Return the group for a torch optimizer, with rate and weight decay adapted to the scale."""
        decay = weight_decay / self.scale**decay_power if self.weight_decay else 0.0
        return {"params": self.params, "lr": self.lr * self.scale**rate_power, "weight_decay": decay}


def param_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, decayed_norms: Sequence[str] = ()
) -> list[ParamGroup]:
    """Divide the trainable parameters of a model into groups.

    Args:
        model: may define ``step_scales() -> {parameter name: scale}``.
        lr: learning rate.
        gate_lr: learning rate of the norms' weights; None for ``lr``.
        decayed_norms: norms whose gates have a sparsity penalty; they get no other weight decay.
    """
    scales = getattr(model, "step_scales", dict)()
    penalized = {f"{name}.weight" for name in decayed_norms}
    gates = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    }
    groups: dict[tuple[bool, float, bool], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_gate, scale, weight_decay = name in gates, float(scales.get(name, 1.0)), name not in penalized
        rate = gate_lr if is_gate and gate_lr is not None else lr
        group = groups.setdefault((is_gate, scale, weight_decay), ParamGroup([], rate, scale, weight_decay))
        group.params.append(parameter)
    return list(groups.values())


@register_optimizer("adam")
def adam(
    groups: Sequence[ParamGroup],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Adam with L2 weight decay (Kingma & Ba, ICLR 2015)."""
    settings = [{**group.settings(weight_decay, 1, 2), "eps": eps / group.scale} for group in groups]
    return torch.optim.Adam(settings, betas=betas, fused=True)


@register_optimizer("adamw")
def adamw(
    groups: Sequence[ParamGroup],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019)."""
    settings = [{**group.settings(weight_decay, 1, 1), "eps": eps / group.scale} for group in groups]
    return torch.optim.AdamW(settings, betas=betas, fused=True)


@register_optimizer("sgd")
def sgd(
    groups: Sequence[ParamGroup], momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum; gates shrink but rarely reach zero, unlike with Adam."""
    settings = [group.settings(weight_decay, 2, 2) for group in groups]
    return torch.optim.SGD(settings, momentum=momentum, nesterov=nesterov, lr=0.0, fused=True)
