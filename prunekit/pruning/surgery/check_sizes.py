"""Input sizes at which every operation of a model that depends on the size acts at least once.

The model runs on the meta device at a range of sizes. What each operation does there (whether a pooling leaves a
remainder, whether a padding or a crop does anything, which branch is taken, whether each weight of a kernel meets a
value of the map) is recorded, and the sizes that show all of it at the least cost are chosen.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.operations.meta import CONVOLUTIONS, POINTWISE, FastShapes, to_meta
from prunekit.pruning.surgery.tape import Tape, VariesError

SMALL = {3: (64, 128), 4: (64, 128), 5: (16, 32)}  # sides to begin with, by the dimension of the images
# How much above it the sizes are: each remainder of a division by 2 to 8 occurs, also after halvings.
OFFSETS = (*range(1, 9), 11, 13, 15, 16, 23, 29, 31, 32)
FEW_OFFSETS = (1, 8, 16, 32)
MAX_SIZES, FEW_SIZES = 6, 2
MAX_VALUES = 4  # an argument with more values than this over all sizes is the size itself
LARGE = 32  # as is a whole number of this size
REORDERING = {"permute", "transpose", "reshape", "view", "flatten", "unflatten", "swapaxes", "movedim"}
CALL = 96 * 96  # what each run costs whatever the size, in pixels
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")

Call = tuple[str, tuple[str, int], str, int]  # module, line, function, number of the call
Behavior = dict[Call, tuple]  # what each call does: pairs (what, value)
ABSENT = (("absent", True),)


def varied_sizes(model: nn.Module, example: Tensor, thorough: bool = True) -> list[tuple[int, ...]]:
    """Choose the cheapest sizes of images at which the model does all that it does at the size of the example,
    (N, C, …), and at others; that size is one of them only where it shows something that smaller ones do not.

    Args:
        thorough: else the two sizes of them that show most are chosen, and the example's only where smaller ones do not
            meet all weights of a kernel.
    """
    size = tuple(example.shape[2:])
    try:
        runs = _Runs(to_meta(model), example[:1].to("meta"))
        found = runs.behaviors([size])
    except Exception:  # It reads values.
        found = {}
    if not found:
        runs = _Runs(model, example[:1])
        found = runs.behaviors([size])
    if not found:
        return []  # The check on the data names the error.
    start = size
    for small in SMALL[example.dim()]:
        fewer = tuple(min(side, small) for side in size)
        if fewer in found or runs.behaviors([fewer]):
            start = fewer
            break
    sides = [start, tuple(min(2 * side, full) for side, full in zip(start, size, strict=True))]
    sides += [tuple(side + more for side in start) for more in (OFFSETS if thorough else FEW_OFFSETS)]
    for longer in range(len(start)) if thorough else ():
        sides.append(tuple(side + 9 * (axis == longer) for axis, side in enumerate(start)))
    return _cover(size, thorough, found | runs.behaviors([side for side in dict.fromkeys(sides) if side != size]))


def _cover(
    needed: tuple[int, ...], thorough: bool, behaviors: dict[tuple[int, ...], Behavior]
) -> list[tuple[int, ...]]:
    calls = dict.fromkeys(call for behavior in behaviors.values() for call in behavior)
    # Calls that do the same at all sizes count as one; what is the same everywhere chooses no size.
    rows = {tuple(behavior.get(call, ABSENT) for behavior in behaviors.values()) for call in calls}
    kinds: dict[tuple[int, ...], set] = {size: set() for size in behaviors}
    for number, row in enumerate(row for row in rows if len(set(row)) > 1):
        values = defaultdict(set)
        for what, value in set().union(*row):
            values[what].add(value)
        few = {what for what, own in values.items() if len(own) <= MAX_VALUES}
        for own, does in zip(kinds.values(), row, strict=True):
            own |= {(number, what, value) for what, value in does if what in few}
    cost = {size: math.prod(size) + CALL for size in kinds}
    every, chosen = set().union(*kinds.values()), []
    vital = every if thorough else {kind for kind in kinds[needed] if kind[1] == "kernel"}
    for wanted, most in ((vital, MAX_SIZES), (every, FEW_SIZES)):
        missing = wanted - set().union(*(kinds[size] for size in chosen))
        while missing and len(chosen) < most:
            chosen.append(max(kinds, key=lambda size: (len(kinds[size] & missing) / cost[size], -cost[size])))
            missing -= kinds[chosen[-1]]
    if (vital & kinds[needed]) - set().union(*(kinds[size] for size in chosen)):
        chosen.append(needed)
    for size in sorted(chosen, key=lambda size: -cost[size]):
        others = [kinds[other] for other in chosen if other != size]
        if len(others) > 1 and kinds[size] <= set().union(*others):
            chosen.remove(size)
    # Two at least, in case something depends on the size that no operation shows.
    for size in sorted(kinds, key=lambda size: cost[size])[: max(2 - len(chosen), 0) + 1]:
        if len(chosen) < 2 and size not in chosen:
            chosen.append(size)
    return sorted(chosen, key=lambda size: cost[size])


class _Runs:
    """Runs of a model at several sizes; of the tape of the first one where that says all."""

    def __init__(self, model: nn.Module, batch: Tensor):
        self.model, self.batch = model, batch
        self.tape = Tape(model)
        self.is_complete = False

    def behaviors(self, sizes: list[tuple[int, ...]]) -> dict[tuple[int, ...], Behavior]:
        """What the operations do at each size that the model accepts."""
        if self.is_complete:
            try:
                return self._played(sizes)
            except VariesError:
                self.is_complete = False
        return self._called(sizes)

    def _image(self, size: tuple[int, ...]) -> Tensor:
        # Each run has its own, since the model may change it.
        same = size == self.batch.shape[2:]
        return self.batch.clone() if same else self.batch.new_zeros((*self.batch.shape[:2], *size))

    @torch.inference_mode()
    def _played(self, sizes: list[tuple[int, ...]]) -> dict[tuple[int, ...], Behavior]:
        found, recorder = {}, _Recorder(self.tape)
        for size in sizes:
            try:
                found[size] = self.tape.replay(self._image(size), recorder.call)
            except VariesError:
                raise
            except Exception:
                continue
        return found

    @torch.inference_mode()
    def _called(self, sizes: list[tuple[int, ...]]) -> dict[tuple[int, ...], Behavior]:
        found, recorder = {}, _Recorder(self.tape)
        with _called_modules(self.model, recorder):
            for size in sizes:
                recorder.start(image := self._image(size))
                try:
                    with recorder:
                        self.model(image)
                except Exception:
                    continue
                found[size] = recorder.found
                self.is_complete = image.is_meta and self.tape.close()
        return found


@contextmanager
def _called_modules(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    def enter(name: str) -> Callable[..., None]:
        return lambda *_: recorder.modules.append(name)

    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    hooks += [module.register_forward_hook(lambda *_: recorder.modules.pop() and None) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(FastShapes):
    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def start(self, image: Tensor) -> None:
        self.modules: list[str] = [""]
        self.calls: Counter[tuple] = Counter()
        self.found: Behavior = {}
        self.tape.open(image)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, does = self.call(func, args, kwargs)
        key = None
        if does is not None:
            site = (self.modules[-1], _line(), getattr(func, "__name__", str(func)))
            self.calls[site] += 1
            key = (*site, self.calls[site])
            self.found[key] = does
        self.tape.add(key, func, args, kwargs, out)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, tuple | None]:
        """What a call returns and does; the latter is None where it has nothing to do with maps."""
        out = super().__torch_function__(func, (), args, kwargs)
        if func in POINTWISE:
            return out, ()
        does = self._actions(func, args, kwargs, out, getattr(func, "__name__", str(func)))
        return out, None if does is None else tuple(does)

    def _actions(self, func: Any, args: Any, kwargs: Any, out: Any, name: str) -> list[tuple[Any, Any]] | None:
        """What a call does; None where it has nothing to do with maps."""
        leaves: list[Any] = []
        _add_leaves((args, kwargs), leaves)
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        if not isinstance(out, Tensor) and not any(shape[2:] for shape in shapes):
            return None
        does: list[tuple[Any, Any]] = []
        for number, leaf in enumerate(leaves):
            if leaf is None or isinstance(leaf, int | float | str):
                if not isinstance(leaf, int) or abs(leaf) < LARGE:
                    does.append((number, leaf))
                if isinstance(leaf, int | float):
                    does.append(((number, "sign"), (leaf > 0) - (leaf < 0)))
        after = out.shape if isinstance(out, Tensor) else ()
        for axis in range(2, len(shapes[0]) if shapes and name not in REORDERING else 0):
            side, result = shapes[0][axis], after[axis] if len(after) == len(shapes[0]) else 0
            ratios = (result and side % result == 0, side and result % side == 0)
            does.append((("axis", axis), (side % 2, (side > result) - (side < result), *ratios)))
        if func in CONVOLUTIONS and len(args) == 7 and _meets_all(shapes[0][2:], shapes[1][2:], after[2:], *args[3:6]):
            does.append(("kernel", True))
        return does


def _meets_all(sides: Any, kernel: Any, after: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether each weight of a kernel is multiplied with a value of the map, not with padding alone."""
    if not all(isinstance(option, tuple) for option in (stride, padding, dilation)):
        return True
    rows = zip(sides, kernel, after, stride, padding, dilation, strict=True)
    return all(far * (size - 1) < side + pad and step * (last - 1) >= pad for side, size, last, step, pad, far in rows)


def _add_leaves(value: Any, found: list[Any]) -> None:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        found.append(value)
        return
    for item in value:
        _add_leaves(item, found)


def _line() -> tuple[str, int]:
    """The line of the user's code that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _is_torch(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@cache
def _is_torch(file: str) -> bool:
    return file.startswith(_TORCH)
