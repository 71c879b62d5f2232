"""The options for deploying a model, and the deployed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class DeployConfig:
    """How to rewrite a model for inference."""

    pad_multiple: int = 1  # Pad channels with zeros to a multiple of this.
    merge_sums: bool = False  # Merge convolutions whose outputs are added.
    prelu_to_relu: bool = False  # Rewrite PReLUs as ReLUs and sums.
    channels_last: bool = False  # Store weights and features channels-last (PyTorch only).
    native_kernels: bool = False  # Use prunekit's C++ kernels (PyTorch on this machine's CPU only).

    def describe(self) -> str:
        """The options that are set, such as "pad_multiple=8, merge_sums"."""
        chosen = [f"pad_multiple={self.pad_multiple}"] if self.pad_multiple > 1 else []
        chosen += [name for name, value in vars(self).items() if value is True]
        return ", ".join(chosen) or "folded norms only"


class DeployedModel(nn.Module):
    """A model rewritten for inference with the options ``config``. It stays in eval mode and cannot be trained."""

    def __init__(self, network: nn.Module, config: DeployConfig):
        super().__init__()
        self.network = network
        self.config = config
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Any:
        if self.config.channels_last:
            inputs = tuple(
                value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value for value in inputs
            )
        # The call of a GraphModule would print the traceback of an error.
        traced = isinstance(self.network, fx.GraphModule)
        return self.network.forward(*inputs) if traced else self.network(*inputs)
