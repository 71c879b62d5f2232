"""The options for deploying a model, and the deployed model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DeployConfig:
    """How to rewrite a model for inference.

    Attributes:
        pad_multiple: Pad channels with zeros to a multiple of this.
        merge_sums: Merge convolutions whose outputs are added.
        merge_inputs: Merge convolutions that read the same input.
        prelu_to_relu: Rewrite PReLUs as ReLUs and sums.
        channels_last: Store weights and features channels-last (PyTorch only).
        native_kernels: Use prunekit's C++ kernels (PyTorch on this machine's CPU only).
    """

    pad_multiple: int = 1
    merge_sums: bool = False
    merge_inputs: bool = False
    prelu_to_relu: bool = False
    channels_last: bool = False
    native_kernels: bool = False


class DeployedModel(nn.Module):
    """A model rewritten for inference. It stays in eval mode and cannot be trained.

    Args:
        network: the rewritten model.
        config: the options it was rewritten with.
    """

    def __init__(self, network: nn.Module, config: DeployConfig):
        super().__init__()
        self.network = network
        self.config = config
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        if self.config.channels_last and image.dim() == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        return self.network(image)
