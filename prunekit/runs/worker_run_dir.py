"""The run folder in the worker processes of distributed training, which must not write to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.runs.run_dir import RunDir


class WorkerRunDir(RunDir):
    """A run folder whose writes stay in memory: a worker reads back what it wrote, and everything else from disk."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._written: dict[str, bytes] = {}

    def write_bytes(self, name: str, data: bytes) -> Path:
        self._written[name] = data
        return self._inside(name)

    def read_bytes(self, name: str) -> bytes:
        return self._written[name] if name in self._written else super().read_bytes(name)

    def has(self, name: str) -> bool:
        return name in self._written or super().has(name)

    def remove(self, *names: str) -> None: ...

    def append_metrics(self, line: dict[str, Any]) -> None: ...

    def truncate_metrics(self, stage: str, epoch: int) -> None: ...

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

    def _write_state(self, state: dict[str, Any]) -> None:
        self._state = state
