"""Dynamic weight decay (Gao et al., ECCV 2020, section 3.4): gates whose channels respond more are decayed more.

    penalty = λ · ½ · Σ_gate w_gate · mean over images( |spatial mean of y| ) · γ²

y is the response behind the norm, through the activation that follows it; it is a weight, not a term to learn by, so
it is detached.

The responses are collected by hooks that exist only inside ``with`` (an attribute of the module, or a counter in it,
would live on in copies and checkpoints; a custom BatchNorm class would have to be taught to every tool that looks at
the model).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.config.registry import register_decay
from prunekit.errors import TrainingError
from prunekit.pruning.plan import Gate, Group


class Decay(ABC):
    """What training asks of a decay: a context in which forwards are seen, and a penalty for what was seen."""

    weight: float = 0.0
    norms: Sequence[str] = ()

    @abstractmethod
    def penalty(self) -> Tensor:
        """The penalty for the forwards since the last call, a scalar with gradient to the gates."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def state(self) -> dict[str, Any]:
        """What a decay of the same model, cut smaller, has to know so that it goes on as this one; as JSON."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        return None


def gates_to_decay(groups: Sequence[Group], exclude: Sequence[str]) -> list[Gate]:
    """The gates of the groups that can be cut, but for norms that one of these patterns (as in a shell) names.

    Raises:
        TrainingError: none is left.
    """
    found = [
        gate
        for group in groups
        if group.reason is None
        for gate in group.gates
        if not any(fnmatchcase(gate.norm, pattern) for pattern in exclude)
    ]
    if not found:
        raise TrainingError("no gate to decay: every group is excluded or cannot be cut; see decay.options.exclude")
    return found


@register_decay("none")
class NoDecay(Decay):
    """No penalty on the gates."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], weight: float = 0.0):
        self._first = next(model.parameters(), None)

    def penalty(self) -> Tensor:
        # Made where the loss is: an accelerator waits for what comes from the CPU.
        return torch.zeros((), device=None if self._first is None else self._first.device)


@register_decay("dynamic")
class DynamicWeightDecay(Decay):
    """Decay of the gates in proportion to their channels' responses (Gao et al., ECCV 2020).

    Args:
        model: the model that will be trained, in the state in which its groups were found.
        groups: from ``find_groups``; the gates of those that can be cut are decayed.
        weight: λ.
        branch_weights: "none", or "flops" to weigh each gate by the side length of its feature map (twice for a
            branch twice as fine, half for a stage half as large), relative to the mean over all gates.
        exclude: patterns (as in a shell) of norms to leave out, for example ["head.*"].

    Raises:
        TrainingError: no gate is left to decay.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        weight: float = 1e-2,
        branch_weights: Literal["none", "flops"] = "none",
        exclude: list[str] | tuple[str, ...] = (),
    ):
        self.weight = weight
        self.branch_weights = branch_weights
        activations = {gate.norm: gate.activation for gate in gates_to_decay(groups, exclude)}
        self.norms = tuple(activations)
        self._gates = [model.get_submodule(name).weight for name in self.norms]
        self._seen = [_Watch(model, name, activations[name]) for name in self.norms]
        self._hooks: list[Any] = []
        self._mean_side: float | None = None
        self._held = False

    def state(self) -> dict[str, Any]:
        return {} if self._mean_side is None else {"mean_side": self._mean_side}

    def load(self, state: dict[str, Any]) -> None:
        # Weights are relative to the mean over the gates that there were, or each cut would change those that are left.
        self._mean_side = state.get("mean_side")
        self._held = self._mean_side is not None

    def __enter__(self) -> Self:
        self._hooks = [watch.start() for watch in self._seen]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for watch in self._seen:
            watch.clear()
        self._hooks = []

    def penalty(self) -> Tensor:
        """The penalty for all images of the forwards since the last call; the responses are forgotten.

        Raises:
            TrainingError: no forward in train mode since the last call.
        """
        silent = [name for name, watch in zip(self.norms, self._seen, strict=True) if not watch.images]
        if silent:
            where = "outside of `with`" if not self._hooks else f"{silent[0]} has seen none"
            raise TrainingError(f"penalty() needs a forward in train mode since its last call; {where}")
        # Everything for all gates at once: there are a hundred norms, and each would be several small operations.
        gates = torch.cat(self._gates)
        responses = self._responses().to(gates.device, gates.dtype)
        if self.branch_weights == "flops":
            sides = torch.tensor([watch.side for watch in self._seen])
            counts = torch.tensor([len(gate) for gate in self._gates])
            if not self._held:
                self._mean_side = float((sides * counts).sum() / counts.sum())
            weights = sides / self._mean_side
            responses = responses * weights.repeat_interleave(counts).to(responses)
        for watch in self._seen:
            watch.clear()
        return 0.5 * self.weight * torch.dot(responses, gates * gates)

    @torch.no_grad()
    def _responses(self) -> Tensor:
        """The mean over the images of all forwards, of all gates in a row."""
        forwards = [[len(part) for part in watch.parts] for watch in self._seen]
        if all(sizes == forwards[0] for sizes in forwards):
            parts = zip(*(watch.parts for watch in self._seen), strict=True)
            return sum(torch.cat(part, 1).abs().sum(0) for part in parts) / self._seen[0].images
        return torch.cat([sum(part.abs().sum(0) for part in watch.parts) / watch.images for watch in self._seen])


class _Watch:
    """Keeps the responses behind one norm, image by image, of all forwards."""

    def __init__(self, model: nn.Module, norm: str, activation: str | None):
        self.function = None
        target = norm
        if activation is not None:
            # A PReLU may be called "prelu" or "relu" in its model.
            if isinstance(dict(model.named_modules()).get(activation), nn.PReLU):
                target = activation
            else:
                self.function = getattr(F, activation)
        # A deep copy of the model (EMA, a teacher) carries the hook along; only this very module is listened to.
        self.module = weakref.ref(model.get_submodule(target))
        self.clear()

    def clear(self) -> None:
        self.parts: list[Tensor] = []
        self.images = 0
        self.side = 0.0

    def start(self) -> Any:
        watch = self

        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if module.training and module is watch.module():
                watch.see(output)

        return self.module().register_forward_hook(hook)

    @torch.no_grad()
    def see(self, y: Tensor) -> None:
        # A fused norm has measured its output on the way (prunekit.training.acceleration).
        means = getattr(y, "channel_means", None)
        if self.function is not None or means is None:
            y = y.detach() if self.function is None else self.function(y.detach())
            y = y if y.dtype == torch.float64 else y.float()
            means = y.flatten(2).mean(2) if y.dim() > 2 else y
        self.parts.append(means)
        self.images += len(y)
        self.side = float(y[0, 0].numel()) ** 0.5
