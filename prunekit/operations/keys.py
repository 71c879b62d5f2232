"""Operations as a dispatch mode sees them: their names, and the modules that call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run the attention of PyTorch operation by operation; its fast path would be one operation."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def operation_name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


class OperationKeys:
    """Identifies each call of an operation by the module that calls it and the number of its calls there."""

    def __init__(self, model: nn.Module):
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[str] = [""]
        self.calls: Counter[str] = Counter()
        self._numbers: Counter[tuple[str, str]] = Counter()

    def next(self, operation: str) -> tuple[str, str, int]:
        key = self.running[-1], operation
        self._numbers[key] += 1
        return *key, self._numbers[key] - 1

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self.running.append(self.names[module])
            self.calls[self.names[module]] += 1

        def leave(*_: Any) -> None:
            self.running.pop()

        # Scripted modules have no hooks.
        hooked = [module for module in self.names if not isinstance(module, torch.jit.ScriptModule)]
        handles = [module.register_forward_pre_hook(enter) for module in hooked]
        handles += [module.register_forward_hook(leave, always_call=True) for module in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
