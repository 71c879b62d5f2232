"""The forward and backward of a model as CUDA graphs: one launch each instead of thousands of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunekit.pruning.sparsity.dynamic_decay import Decay


class GraphedForward:
    """Forward of a model in train mode, captured with the first batch; all batches must have its shape.

    The graphs repeat what Python did during the capture, so a model must not choose its path by Python's random numbers
    or by values of tensors. If the capture fails, the model computes as usual.

    Args:
        model: on a CUDA device, in train mode.
        decay: its hooks are on the model; their responses are outputs of the graph.
        bf16: whether the forward uses bf16 autocast.
        say: called with one line if the capture fails.
    """

    def __init__(self, model: nn.Module, decay: Decay, bf16: bool, say: Callable[[str], None]):
        self.model, self.decay, self.bf16, self.say = model, decay, bf16, say
        self.graph: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self.failed = False

    def __call__(self, images: Tensor) -> Tensor:
        if self.graph is None and not self.failed:
            self._capture(images)
        if self.graph is None:
            return self.model(images)
        output, *responses = self.graph(images)
        # The next replay writes to the same memory.
        self.decay.add_responses([response.clone() for response in responses])
        return output

    def _capture(self, images: Tensor) -> None:
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            # Autocast is set within the graph, where it must not cache casted weights.
            with torch.autocast("cuda", enabled=False):
                probe = _ForwardWithResponses(self.model, self.decay, self.bf16)
                self.graph = torch.cuda.make_graphed_callables(probe, (images,), allow_unused_input=True)
        except Exception as error:  # captured code raises many types
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(f"train.cuda_graphs: the model cannot be captured ({reason[:200]}); training without")
            self.failed = True
        # The warm-up before a capture changes the statistics of norms.
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


class _ForwardWithResponses(nn.Module):
    def __init__(self, model: nn.Module, decay: Decay, bf16: bool):
        super().__init__()
        self.model, self.decay, self.bf16 = model, decay, bf16

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.model(images), *self.decay.pop_responses()
