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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from prunekit.pruning.graph.meta import FastShapes, to_meta

PERIOD = 32  # sizes are tried up to this much above the example's, so that all remainders of common strides occur
MAX_SIZES = 6
MAX_VALUES = 4  # an argument with more values than this over all sizes is the size itself
_TORCH = os.path.dirname(torch.__file__)

Behavior = dict[tuple, Any]  # (module, line, function, number of the call, what) → value


def varied_sizes(model: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    """Choose sizes besides the example's, (N, C, …), at which the model does something that it does not do there."""
    size = tuple(example.shape[2:])
    try:
        runner, batch = to_meta(model), example[:1].to("meta")
        base = _behavior(runner, batch)
    except Exception:  # It reads values.
        runner, batch = model, example[:1]
        try:
            base = _behavior(runner, batch)
        except Exception:
            return []  # The check on the data names the error.
    behaviors = {size: base}
    sides = [tuple(side + more for side in size) for more in range(1, PERIOD + 1)]
    sides += [tuple(side + 9 * (axis == longer) for axis, side in enumerate(size)) for longer in range(len(size))]
    for other in dict.fromkeys(sides):
        try:
            behaviors[other] = _behavior(runner, batch.new_zeros((*batch.shape[:2], *other)))
        except Exception:
            continue  # The model does not accept this size.
    return _cover(size, behaviors)


def _cover(first: tuple[int, ...], behaviors: dict[tuple[int, ...], Behavior]) -> list[tuple[int, ...]]:
    values = defaultdict(set)
    for behavior in behaviors.values():
        for key, value in behavior.items():
            values[key].add(value)
    kinds = {
        size: {item for item in behavior.items() if len(values[item[0]]) <= MAX_VALUES}
        for size, behavior in behaviors.items()
    }
    seen, chosen = kinds.pop(first), []
    while kinds and len(chosen) < MAX_SIZES:
        best = max(kinds, key=lambda size: (len(kinds[size] - seen), [-side for side in size]))
        if chosen and kinds[best] <= seen:
            break
        seen |= kinds.pop(best)
        chosen.append(best)
    return chosen


@torch.inference_mode()
def _behavior(model: nn.Module, batch: Tensor) -> Behavior:
    """Run a model and return what its operations do at this size."""
    recorder = _Recorder()
    with _called_modules(model, recorder), FastShapes(), recorder:
        model(batch.clone())  # it may change its input
    return recorder.found


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


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.modules: list[str] = [""]
        self.calls: Counter[tuple] = Counter()
        self.found: Behavior = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}))
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        if not isinstance(out, Tensor) and not any(shape[2:] for shape in shapes):
            return out
        site = (self.modules[-1], _line(), getattr(func, "__name__", str(func)))
        self.calls[site] += 1
        key = (*site, self.calls[site])
        for number, leaf in enumerate(leaves):
            if leaf is None or isinstance(leaf, int | float | str | bool):
                self.found[*key, number] = leaf
                self.found[*key, number, "sign"] = isinstance(leaf, int | float) and (leaf > 0) - (leaf < 0)
        after = out.shape if isinstance(out, Tensor) else ()
        for axis in range(2, len(shapes[0]) if shapes else 0):
            side, result = shapes[0][axis], after[axis] if len(after) == len(shapes[0]) else 0
            ratios = (result and side % result == 0, side and result % side == 0)
            self.found[*key, "axis", axis] = (side % 2, (side > result) - (side < result), *ratios)
        return out


def _line() -> tuple[str, int]:
    """The line of the user's code that is running."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
