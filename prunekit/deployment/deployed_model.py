"""The options for deploying a model, and the deployed model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DeployConfig:
    """How to rewrite a model for inference."""

    pad_multiple: int = 1  # Pad channels with zeros to a multiple of this.
    merge_sums: bool = False  # Merge convolutions whose outputs are added.
    prelu_to_relu: bool = False  # Rewrite PReLUs as ReLUs and sums.
    channels_last: bool = False  # Store weights and features channels-last (PyTorch only).
    native_kernels: bool = False  # Use prunekit's C++ kernels (PyTorch on this machine's CPU only).


class DeployedModel(nn.Module):
    """A model rewritten for inference with the options ``config``. It stays in eval mode and cannot be trained."""

    def __init__(self, network: nn.Module, config: DeployConfig):
        super().__init__()
        self.network = network
        self.config = config
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        if self.config.channels_last and image.dim() == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        return self.network(image)
