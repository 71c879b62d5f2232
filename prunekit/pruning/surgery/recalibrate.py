"""Recalibration of BatchNorm statistics after a cut that is not exact (Izmailov et al., UAI 2018)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError
from prunekit.utils.copying import kept_modes


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the running statistics of every BatchNorm again, in place, without labels.

    Running mean and variance become the averages of the means and unbiased variances of the batches, all with equal
    weight. Norms run in train mode, everything else in eval mode; modes and momenta are restored. The constants of
    carriers and of folded channels stay exact.

    Args:
        model: on the device of the batches.
        batches: inputs of the model.

    Returns:
        The number of batches; 0, without running the model, where no norm has statistics.

    Raises:
        PlanError: there is no batch, or a statistic is not finite; the old statistics are restored.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return 0
    saved = {name: (n.momentum, {k: v.clone() for k, v in n.named_buffers()}) for name, n in norms.items()}
    restore, count = set(norms), 0
    with kept_modes(model):
        try:
            model.eval()
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
                norm.train()
            for count, batch in enumerate(batches, 1):
                try:
                    model(batch.clone())  # it may change its input
                except ValueError as error:
                    # PyTorch's, for a norm that sees a single value per channel.
                    raise PlanError(f"recalibrate fails on batch {count} ({error}); use larger batches") from error
            if not count:
                raise PlanError("recalibrate got no batch; pass at least one")
            for name, norm in norms.items():
                if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
                    raise PlanError(f"the statistics of {name} are not finite; check the batches")
            # A norm that is not called keeps its statistics.
            restore = {name for name, norm in norms.items() if norm.num_batches_tracked == 0}
        finally:
            for name, norm in norms.items():
                norm.momentum, buffers = saved[name]
                for key, value in buffers.items() if name in restore else ():
                    getattr(norm, key).copy_(value)
    return count
