"""What the steps of an octavized network are: layers and functions on features of several resolutions, and the module
that runs them.

A feature is a :class:`Branches`; branch ``b`` has 1/2^b of the height and width of branch 0, rounded up. Where slimming
has taken a branch out, its tensor is None and its modules are missing; every step goes on without it.
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
    """A multi-scale feature.

    Attributes:
        xs: the branches, (N, C_b, ⌈H/2^b⌉, ⌈W/2^b⌉) each; None for one that is absent.
        batch: N.
        size: (H, W) of branch 0, which a coarser one could not tell where they are odd.
    """

    xs: list[Tensor | None]
    batch: int
    size: tuple[int, int]


def one_branch(x: Tensor) -> Branches:
    """A plain tensor (N, C, H, W) as a feature of one branch."""
    return Branches([x], x.shape[0], (x.shape[-2], x.shape[-1]))


def merge(feature: Branches) -> Tensor:
    """A plain tensor (N, Σ C_b, H, W): the branches up-sampled to the finest, and put side by side."""
    parts = [
        x if b == 0 else F.interpolate(x, size=feature.size, mode="bilinear", align_corners=False)
        for b, x in enumerate(feature.xs)
        if x is not None
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def each(function: Callable[..., Tensor], feature: Branches, *args: Any, **kwargs: Any) -> Branches:
    """A function of each element, or of each channel at its own size, applied to each branch."""
    return feature._replace(xs=[None if x is None else function(x, *args, **kwargs) for x in feature.xs])


def add(a: Branches, b: Branches) -> Branches:
    """The sum, branch by branch; an absent branch adds nothing."""
    return a._replace(xs=[y if x is None else x if y is None else x + y for x, y in zip(a.xs, b.xs, strict=True)])


def pool(function: Callable[..., Tensor], feature: Branches, stride: int, floor: bool, **options: Any) -> Branches:
    """A 2-D pooling of each branch.

    Args:
        function: ``F.max_pool2d`` or ``F.avg_pool2d``, with its ``options``.
        stride: by which the sides shrink.
        floor: whether sides that do not divide are rounded down. The coarser branches then round up, so that each
            position has its window, and are resized (by less than one pixel) to what is half the finest one.
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
    """Each branch pooled to one and the same size, and put side by side on axis 1."""
    parts = [function(x, *args, **kwargs) for x in feature.xs if x is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def same(value: Any) -> Any:
    return value


def method(value: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method."""
    return getattr(value, name)(*args, **kwargs)


class OctaveLayer(MultiScaleLayer):
    """A convolution of all branches (or none), then a norm and a PReLU for each of them, where there are any.

    Args:
        mix: a gOctConv; or
        convs: a depthwise convolution for each branch, with its ``stride``.
        norms, acts: by branch; without an entry a branch is handed on as it is.
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
        """Args: a feature, or a plain tensor as one of one branch."""
        # Asked this way round, what traces the layer (torch.fx) is taken for the tensor that it stands for.
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
        norm, act = (None if held is None else held.take(branch) for held in (self.norms, self.acts))
        if x is None and norm is not None:
            # All that this branch was made of is gone, but not what it is added to: the norm of nothing is a constant.
            held = norm.running_mean if norm.weight is None else norm.weight
            x = held if held is None else held.new_zeros(batch, len(held), *branch_size(size, branch))
        if x is not None and norm is not None:
            x = norm(x)
        return x if x is None or act is None else act(x)


class Ref(NamedTuple):
    """In a step's arguments: the value of an earlier step."""

    index: int


class Attr(NamedTuple):
    """In a step's arguments: a module, a parameter or a buffer of the network."""

    name: str


class Training(NamedTuple):
    """In a step's arguments: whether the network is in train mode."""


@dataclass(frozen=True)
class Step:
    """A call. ``target`` is a function or an :class:`Attr`; ``last`` names the steps whose values it is the last to
    use."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    last: tuple[int, ...] = ()


class Octavized(nn.Module):
    """A network that ``octavize`` made. Its modules have the names that they had; a layer of several resolutions stands
    where its convolution stood, with the norm and the PReLU behind it.

    Attributes:
        octave_layers: names of the layers of several resolutions, in order of computation.
        octave_left: the layers that were left as they are, and where branches are made one tensor again: name → reason.

    Shape:
        as the original's.
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
            _home(self, name).add_module(name.rpartition(".")[2], module)
        for name, tensor in tensors.items():
            home, last = _home(self, name), name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                home.register_parameter(last, tensor)
            else:
                home.register_buffer(last, tensor, persistent=name in persistent)
        self._steps = _with_last(steps)

    def forward(self, image: Tensor) -> Any:
        values: dict[int, Any] = {0: image}
        for index, step in enumerate(self._steps, start=1):
            target = self._fill(step.target, values)
            values[index] = target(*self._fill(step.args, values), **self._fill(step.kwargs, values))
            for spent in step.last:
                del values[spent]
        return values[len(self._steps)]

    def step_scales(self) -> dict[str, float]:
        """How much larger each parameter is stored than it is meant; as the original said of its own."""
        held = dict(self.named_parameters())
        return {name: scale for name, scale in self._scales.items() if name in held}

    def _fill(self, item: Any, values: Mapping[int, Any]) -> Any:
        """Arguments with what their markers stand for."""
        if isinstance(item, Ref):
            return values[item.index]
        if isinstance(item, Attr):
            home, _, name = item.name.rpartition(".")
            return getattr(self.get_submodule(home), name)
        if isinstance(item, Training):
            return self.training
        if isinstance(item, tuple | list):
            return type(item)(self._fill(part, values) for part in item)
        if isinstance(item, dict):
            return {key: self._fill(part, values) for key, part in item.items()}
        if isinstance(item, slice):
            return slice(*(self._fill(part, values) for part in (item.start, item.stop, item.step)))
        return item


def refs(item: Any) -> set[int]:
    """The steps that arguments refer to."""
    if isinstance(item, Ref):
        return {item.index}
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, slice):
        item = [item.start, item.stop, item.step]
    return {index for part in item for index in refs(part)} if isinstance(item, tuple | list) else set()


def _with_last(steps: Sequence[Step]) -> list[Step]:
    """Steps that know which values nobody needs after them."""
    needed, out = {len(steps)}, []
    for index, step in reversed(list(enumerate(steps, start=1))):
        used = refs((step.target, step.args, step.kwargs)) | {index}
        out.append(replace(step, last=tuple(sorted(used - needed))))
        needed |= used
    return out[::-1]


def _home(root: nn.Module, name: str) -> nn.Module:
    """The module in which the one of this name stands, made where it is not there yet."""
    for part in name.split(".")[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root
