"""Optimisers by name, with gates and stored step scales as parameter groups of their own.

A backbone may store a parameter ``s`` times as large as its model is defined with (``step_scales``). Then, for the
model to train as if it were stored plainly, its learning rate, ε and weight decay follow from s:

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

import torch
from torch import nn

from prunekit.config.registry import register_optimizer


@dataclass
class ParamGroup:
    """Parameters that are treated alike.

    Attributes:
        lr: learning rate of the plainly stored parameter.
        scale: how much larger it is stored.
        decayed: whether the optimiser's own weight decay applies.
    """

    params: list[nn.Parameter]
    lr: float
    scale: float = 1.0
    decayed: bool = True


def param_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, decayed_norms: Sequence[str] = ()
) -> list[ParamGroup]:
    """Divide a model's parameters.

    Args:
        model: it may offer ``step_scales() -> {parameter name: factor}``.
        lr: learning rate.
        gate_lr: of the norms' weights; None for ``lr``.
        decayed_norms: norms whose gates a decay of their own drives; the optimiser's weight decay leaves them alone.
    """
    offered = getattr(model, "step_scales", dict)()
    steered = {f"{name}.weight" for name in decayed_norms}
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    found: dict[tuple[bool, float, bool], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name in norms, float(offered.get(name, 1.0)), name not in steered
        if key not in found:
            rate = gate_lr if key[0] and gate_lr is not None else lr
            found[key] = ParamGroup([], rate, key[1], key[2])
        found[key].params.append(parameter)
    return list(found.values())


@register_optimizer("adam")
def adam(
    groups: Sequence[ParamGroup],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Adam with L2 weight decay (Kingma & Ba, ICLR 2015)."""
    return torch.optim.Adam(
        [
            {
                "params": g.params,
                "lr": g.lr * g.scale,
                "eps": eps / g.scale,
                "weight_decay": weight_decay / g.scale**2 if g.decayed else 0.0,
            }
            for g in groups
        ],
        betas=betas,
        fused=True,
    )


@register_optimizer("adamw")
def adamw(
    groups: Sequence[ParamGroup],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019)."""
    return torch.optim.AdamW(
        [
            {
                "params": g.params,
                "lr": g.lr * g.scale,
                "eps": eps / g.scale,
                "weight_decay": weight_decay / g.scale if g.decayed else 0.0,
            }
            for g in groups
        ],
        betas=betas,
        fused=True,
    )


@register_optimizer("sgd")
def sgd(
    groups: Sequence[ParamGroup], momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum. Note that under it gates only shrink; Adam makes them zero."""
    return torch.optim.SGD(
        [
            {
                "params": g.params,
                "lr": g.lr * g.scale**2,
                "weight_decay": weight_decay / g.scale**2 if g.decayed else 0.0,
            }
            for g in groups
        ],
        momentum=momentum,
        nesterov=nesterov,
        lr=0.0,
        fused=True,
    )
