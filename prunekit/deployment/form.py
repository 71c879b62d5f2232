"""How a deployed model is written, and the model so written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """One way to write a model.

    Attributes:
        multiple: channels are padded with zeros to multiples of this.
        sums: convolutions that meet in a sum are one.
        inputs: convolutions that read the same are one.
        relus: PReLUs are written as ReLUs and sums.
        channels_last: memory format of the weights (PyTorch).
        kernels: computed by kernels of our own, on this machine's CPU alone (PyTorch).
    """

    multiple: int = 1
    sums: bool = False
    inputs: bool = False
    relus: bool = False
    channels_last: bool = False
    kernels: bool = False


class Deployed(nn.Module):
    """A model in its deployed form; in eval mode, and never to be trained.

    Attributes:
        form: how it is written.
    """

    def __init__(self, network: nn.Module, form: Form):
        super().__init__()
        self.network = network
        self.form = form
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        if self.form.channels_last and image.dim() == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        return self.network(image)
