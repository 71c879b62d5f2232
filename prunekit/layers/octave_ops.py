"""Layers and functions on multi-scale features, and the module that runs an octavized network.

A branch that pruning removed is None, its modules are missing, and every operation skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.layers.goctconv import GOctConv, branch_size
from prunekit.layers.optional import DepthwiseModules, MultiScaleLayer, OptionalModules


class Branches(NamedTuple):
    """A multi-scale feature."""

    xs: list[Tensor | None]  # (N, C_b, ⌈H/2^b⌉, ⌈W/2^b⌉) each; None for an absent branch
    batch: int  # N
    size: tuple[int, int]  # (H, W) of branch 0, which cannot be computed from a coarser branch if odd


def one_branch(x: Tensor) -> Branches:
    """Wrap a tensor (N, C, H, W) as a feature with one branch."""
    return Branches([x], x.shape[0], (x.shape[-2], x.shape[-1]))


def merge(feature: Branches) -> Tensor:
    """Upsample the branches to the finest one and concatenate them: (N, Σ C_b, H, W)."""
    parts = [
        x if b == 0 else F.interpolate(x, size=feature.size, mode="bilinear", align_corners=False)
        for b, x in enumerate(feature.xs)
        if x is not None
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def each(function: Callable[..., Tensor], feature: Branches, *args: Any, **kwargs: Any) -> Branches:
    """Apply an elementwise or channelwise function to each branch."""
    return feature._replace(xs=[None if x is None else function(x, *args, **kwargs) for x in feature.xs])


def add(a: Branches, b: Branches) -> Branches:
    """Add two features branch by branch; an absent branch counts as zero."""
    return a._replace(xs=[y if x is None else x if y is None else x + y for x, y in zip(a.xs, b.xs, strict=True)])


def pool(function: Callable[..., Tensor], feature: Branches, stride: int, floor: bool, **options: Any) -> Branches:
    """Apply ``F.max_pool2d`` or ``F.avg_pool2d`` with ``options`` to each branch.

    If sizes are rounded down (``floor``), coarser branches round up, so that each position has a window, and are
    resized (by less than one pixel) to match the finest branch.
    """
    height, width = (side // stride if floor else (side + stride - 1) // stride for side in feature.size)
    ys: list[Tensor | None] = []
    for b, x in enumerate(feature.xs):
        if x is not None and floor and b:
            x = function(x, stride=stride, **{**options, "ceil_mode": True})
            x = F.interpolate(x, size=branch_size((height, width), b), mode="bilinear", align_corners=False)
        elif x is not None:
            x = function(x, stride=stride, **options)
        ys.append(x)
    return feature._replace(xs=ys, size=(height, width))


def pool_globally(function: Callable[..., Tensor], feature: Branches, *args: Any, **kwargs: Any) -> Tensor:
    """Pool each branch to the same size and concatenate them on axis 1."""
    parts = [function(x, *args, **kwargs) for x in feature.xs if x is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def identity(value: Any) -> Any:
    return value


def call_method(value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(value, name)(*args, **kwargs)


class OctaveLayer(MultiScaleLayer):
    """An optional gOctConv ``mix``, or a depthwise convolution per branch, with ``stride``; then norms and PReLUs.

    A branch without an entry in ``norms`` or ``acts`` passes through unchanged.
    """

    def __init__(
        self,
        mix: GOctConv | None = None,
        convs: Mapping[str, nn.Module] | None = None,
        stride: int = 1,
        norms: Mapping[str, nn.Module] | None = None,
        acts: Mapping[str, nn.Module] | None = None,
    ):
        super().__init__()
        self.mix = mix
        self.convs = None if convs is None else DepthwiseModules(dict(convs))
        self.norms = OptionalModules(dict(norms)) if norms else None
        self.acts = OptionalModules(dict(acts)) if acts else None
        self.stride = stride if mix is None else mix.stride

    def forward(self, feature: Branches | Tensor) -> Branches:
        # Not `isinstance(feature, Tensor)`: under torch.fx the argument is a Proxy of a tensor.
        if not isinstance(feature, Branches):
            feature = one_branch(feature)
        size = branch_size(feature.size, 0, self.stride)
        xs: Sequence[Tensor | None] = feature.xs
        if self.mix is not None:
            xs = self.mix(xs, feature.size)
        elif self.convs is not None:
            xs = [None if x is None else self.convs[str(b)](x) for b, x in enumerate(xs)]
        ys = [self._finish(b, x, feature.batch, size) for b, x in enumerate(xs)]
        return Branches(ys, feature.batch, size)

    def _finish(self, branch: int, x: Tensor | None, batch: int, size: tuple[int, int]) -> Tensor | None:
        norm, act = (None if modules is None else modules.take(branch) for modules in (self.norms, self.acts))
        if x is None and norm is not None:
            # All inputs of this branch were pruned, but it is added to another one: the norm of zeros is a constant.
            like = norm.running_mean if norm.weight is None else norm.weight
            x = like if like is None else like.new_zeros(batch, len(like), *branch_size(size, branch))
        if x is not None and norm is not None:
            x = norm(x)
        return x if x is None or act is None else act(x)


@dataclass(frozen=True)
class Ref:
    """In the arguments of a step: the value of an earlier step."""

    index: int


@dataclass(frozen=True)
class Attr:
    """In the arguments of a step: a module, parameter or buffer of the network."""

    name: str


@dataclass(frozen=True)
class Training:
    """In the arguments of a step: whether the network is in train mode."""


@dataclass(frozen=True)
class Step:
    """A call of ``target``, a function or an :class:`Attr`; it is the last user of the values of the steps ``last``."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    last: tuple[int, ...] = ()


class Octavized(nn.Module):
    """The result of ``octavize``. Modules keep their names; a multi-scale layer has the name of the convolution that it
    replaces and includes the norm and PReLU that follow it.

    Attributes:
        octave_layers: names of the multi-scale layers, in order of computation.
        octave_left: layers that were not rewritten, and places where branches are merged: name → reason.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        persistent: Container[str] = (),
    ):
        super().__init__()
        self.octave_layers: list[str] = []
        self.octave_left: dict[str, str] = {}
        self._scales: dict[str, float] = {}
        for name, module in modules.items():
            _parent(self, name).add_module(name.rpartition(".")[2], module)
        for name, tensor in tensors.items():
            parent, last = _parent(self, name), name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                parent.register_parameter(last, tensor)
            else:
                parent.register_buffer(last, tensor, persistent=name in persistent)
        self._steps = _with_last(steps)

    def forward(self, image: Tensor) -> Any:
        values: dict[int, Any] = {0: image}
        for index, step in enumerate(self._steps, start=1):
            target = self._fill(step.target, values)
            values[index] = target(*self._fill(step.args, values), **self._fill(step.kwargs, values))
            for unused in step.last:
                del values[unused]
        return values[len(self._steps)]

    def step_scales(self) -> dict[str, float]:
        """Return the factor by which each stored parameter is enlarged; see the original network."""
        present = dict(self.named_parameters())
        return {name: scale for name, scale in self._scales.items() if name in present}

    def _fill(self, item: Any, values: Mapping[int, Any]) -> Any:
        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return values[leaf.index]
            if isinstance(leaf, Attr):
                parent, _, name = leaf.name.rpartition(".")
                return getattr(self.get_submodule(parent), name)
            return self.training if isinstance(leaf, Training) else leaf

        return map_leaves(item, fill)


def map_leaves(item: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to each leaf of nested tuples, lists, dicts and slices; the result has plain containers."""
    if isinstance(item, dict):
        return {key: map_leaves(part, function) for key, part in item.items()}
    if isinstance(item, slice):
        return slice(*(map_leaves(part, function) for part in (item.start, item.stop, item.step)))
    if isinstance(item, list):
        return [map_leaves(part, function) for part in item]
    if isinstance(item, tuple) and not isinstance(item, torch.Size):
        return tuple(map_leaves(part, function) for part in item)
    return function(item)


def refs(item: Any) -> set[int]:
    """Return the indices of the steps that arguments refer to."""
    found: set[int] = set()
    map_leaves(item, lambda leaf: found.add(leaf.index) if isinstance(leaf, Ref) else None)
    return found


def _with_last(steps: Sequence[Step]) -> list[Step]:
    needed, out = {len(steps)}, []
    for index, step in reversed(list(enumerate(steps, start=1))):
        used = refs((step.target, step.args, step.kwargs)) | {index}
        out.append(replace(step, last=tuple(sorted(used - needed))))
        needed |= used
    return out[::-1]


def _parent(root: nn.Module, name: str) -> nn.Module:
    """Return the parent of the module ``name``, created if it does not exist."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root
