"""A run folder for those of several processes that train along and write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.runs.run_dir import RunDir


class WorkerRunDir(RunDir):
    """A run folder in the eyes of a process that does not write it: it finds there what it would have written."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._mine: dict[str, bytes] = {}

    def write_bytes(self, name: str, data: bytes) -> Path:
        self._mine[name] = data
        return self._inside(name)

    def read_bytes(self, name: str) -> bytes:
        return self._mine[name] if name in self._mine else super().read_bytes(name)

    def has(self, name: str) -> bool:
        return name in self._mine or super().has(name)

    def append_metrics(self, line: dict[str, Any]) -> None: ...

    def truncate_metrics(self, stage: str, epoch: int) -> None: ...

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

    def _write_state(self, state: dict[str, Any]) -> None:
        self._state = state
