"""Input sizes at which every operation of a model that depends on the size acts at least once.

The model runs on the meta device at a range of sizes. What each operation does there (whether a pooling leaves a
remainder, whether a padding or a crop does anything, which branch is taken) is recorded, and the fewest sizes that show
all of it are chosen.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.operations.meta import FastShapes, to_meta

# How much above the example's size the sizes are: each remainder of a division by 2 to 8 occurs, also after halvings.
OFFSETS = (*range(1, 9), 11, 13, 15, 16, 23, 29, 31, 32)
MAX_SIZES = 6
MAX_VALUES = 4  # an argument with more values than this over all sizes is the size itself
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")

Call = tuple[str, tuple[str, int], str, int]  # module, line, function, number of the call
Behavior = dict[Call, tuple]  # what each call does: pairs (what, value)


def varied_sizes(model: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    """Choose sizes besides the example's, (N, C, …), at which the model does something that it does not do there."""
    size = tuple(example.shape[2:])
    try:
        runner, batch = to_meta(model), example[:1].to("meta")
        base = _behaviors(runner, batch, [size])
    except Exception:  # It reads values.
        base = {}
    if not base:
        runner, batch = model, example[:1]
        base = _behaviors(runner, batch, [size])
    if not base:
        return []  # The check on the data names the error.
    sides = [tuple(side + more for side in size) for more in OFFSETS]
    sides += [tuple(side + 9 * (axis == longer) for axis, side in enumerate(size)) for longer in range(len(size))]
    return _cover(size, base | _behaviors(runner, batch, list(dict.fromkeys(sides))))


def _cover(first: tuple[int, ...], behaviors: dict[tuple[int, ...], Behavior]) -> list[tuple[int, ...]]:
    calls = dict.fromkeys(call for behavior in behaviors.values() for call in behavior)
    # Calls that do the same at all sizes count as one, with their number; what is the same everywhere chooses no size.
    counts = Counter(tuple(behavior.get(call, ()) for behavior in behaviors.values()) for call in calls)
    rows = [row for row in counts if len(set(row)) > 1]
    kinds: dict[tuple[int, ...], set] = {size: set() for size in behaviors}
    for number, row in enumerate(rows):
        values = defaultdict(set)
        for what, value in set().union(*row):
            values[what].add(value)
        few = {what for what, own in values.items() if len(own) <= MAX_VALUES}
        for own, does in zip(kinds.values(), row, strict=True):
            own |= {(number, what, value) for what, value in does if what in few}
    seen, chosen = kinds.pop(first), []
    while kinds and len(chosen) < MAX_SIZES:
        new = {size: sum(counts[rows[number]] for number, _, _ in own - seen) for size, own in kinds.items()}
        best = max(kinds, key=lambda size: (new[size], [-side for side in size]))
        if chosen and kinds[best] <= seen:
            break
        seen |= kinds.pop(best)
        chosen.append(best)
    return chosen


@torch.inference_mode()
def _behaviors(model: nn.Module, batch: Tensor, sizes: list[tuple[int, ...]]) -> dict[tuple[int, ...], Behavior]:
    """Run a model and return what its operations do at each size that it accepts."""
    found, recorder = {}, _Recorder()
    # Each run has its own input, since the model may change it.
    inputs = {
        size: batch.clone() if size == batch.shape[2:] else batch.new_zeros((*batch.shape[:2], *size)) for size in sizes
    }
    with _called_modules(model, recorder), recorder:
        for size, image in inputs.items():
            recorder.start()
            try:
                model(image)
            except Exception:
                continue
            found[size] = recorder.found
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
    def start(self) -> None:
        self.modules: list[str] = [""]
        self.calls: Counter[tuple] = Counter()
        self.found: Behavior = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_function__(func, types, args, kwargs)
        leaves = list(_leaves((args, kwargs)))
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        if not isinstance(out, Tensor) and not any(shape[2:] for shape in shapes):
            return out
        site = (self.modules[-1], _line(), getattr(func, "__name__", str(func)))
        self.calls[site] += 1
        does: list[tuple[Any, Any]] = []
        for number, leaf in enumerate(leaves):
            if leaf is None or isinstance(leaf, int | float | str | bool):
                sign = isinstance(leaf, int | float) and (leaf > 0) - (leaf < 0)
                does += [(number, leaf), ((number, "sign"), sign)]
        after = out.shape if isinstance(out, Tensor) else ()
        for axis in range(2, len(shapes[0]) if shapes else 0):
            side, result = shapes[0][axis], after[axis] if len(after) == len(shapes[0]) else 0
            ratios = (result and side % result == 0, side and result % side == 0)
            does.append((("axis", axis), (side % 2, (side > result) - (side < result), *ratios)))
        self.found[*site, self.calls[site]] = tuple(does)
        return out


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _line() -> tuple[str, int]:
    """The line of the user's code that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
