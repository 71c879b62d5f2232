"""The norms' statistics, measured anew: after a cut that was not exact, what reaches a norm is not what it has learned.

Cheap, and needs no labels; the same is done for averaged weights (Izmailov et al., UAI 2018).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekit.errors import PlanError


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the running statistics of every BatchNorm again, in place.

    Running mean and variance become the averages, each batch weighing the same, of the batches' own means and
    (unbiased) variances. With batches of one size the mean is that of all images together; the variance lacks what the
    batches' means differ by, as that of any training does. Norms run in train mode, all else (dropout) in eval mode;
    modes and momenta are as before in the end.

    A norm sees what those before it give by the statistics of the very batch, so one pass measures all of them. A
    channel that carries a constant has γ = 0 and gives β whatever its statistics; constants that were folded into a
    running mean are measured again with the rest, and cancel as before.

    Args:
        model: on the device of the batches.
        batches: inputs, as the model takes them.

    Returns:
        how many batches there were; where the model has no norm with statistics, 0, and nothing is run.

    Raises:
        PlanError: there is no batch, or a norm's statistics come out not finite; the old ones are put back.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    held = {name: {key: value.clone() for key, value in norm.named_buffers()} for name, norm in norms.items()}
    done, whole = 0, False
    try:
        model.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # torch's sign for a plain average
            norm.train()
        for batch in batches:
            try:
                model(batch)
            except ValueError as error:
                # torch's, of a norm that sees a single value a channel.
                raise PlanError(f"recalibrate fails on batch {done + 1} ({error}); give larger batches") from error
            done += 1
        if not done:
            raise PlanError("recalibrate got no batch; give it one at least")
        for name, norm in norms.items():
            if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
                raise PlanError(f"the statistics of {name} come out not finite; are the batches?")
            if norm.num_batches_tracked == 0:
                # Not on the way of these batches: what it had is better than nothing.
                _put_back(norm, held[name])
        whole = True
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            if not whole:
                _put_back(norm, held[name])
        for module, mode in modes.items():
            module.training = mode
    return done


def _put_back(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for key, value in buffers.items():
        getattr(norm, key).copy_(value)
