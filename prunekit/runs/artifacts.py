"""The files of a run folder: written atomically, and verified by a checksum when they are read.

``state.json`` records what a file will be before it is replaced, and what it is afterwards, so that a kill is not taken
for damage. The checksum of ``metrics.jsonl`` covers the lines recorded so far; one more line may follow.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.errors import CheckpointError, PrunekitError, RunFolderError
from prunekit.runs import state as states
from prunekit.runs.checkpoint_store import CheckpointStore, encode_tensors
from prunekit.runs.stage_order import FILE_STAGES, STAGES, stage_index, stage_that_writes, training_position
from prunekit.runs.state import STATE
from prunekit.runs.written_files import remove_written
from prunekit.utils.io import encode_json, fsync_folder, os_error_reason, sha256, write_atomic, write_error
from prunekit.utils.lock import FolderLock
from prunekit.utils.safe_decode import decode_arrays, decode_json, decode_tensors

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
_UNCHECKED = (STATE, "run.log")
# Written once and by no stage: a kill between the file and its checksum would leave them without one for good.
_WRITTEN_ONCE = (RECIPE, "data.json", "classes.json", "init/plan.json", "init/model.safetensors")
# Measurements of the models in the folder, which become invalid with them; a user may remove these files.
_MEASUREMENTS = ("eval.json", "bench.json")
_MAX_READS = 20  # of a file that another process keeps replacing


class ArtifactStore:
    """Reads and, with a lock, writes the files of one run folder."""

    def __init__(self, path: Path, state: dict[str, Any], lock: FolderLock | None):
        self.path = path
        self._state = state
        self._lock = lock

    # ---- writing

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file, named by its relative path with ``/``, atomically; record its checksum and return its path.

        A write that fails raises CheckpointError and leaves the old file unchanged.
        """
        path = self._inside(name)
        self._require_write_access()
        if name in _UNCHECKED or name.startswith("report/"):
            write_atomic(path, data)
            return path
        new, old = sha256(data), self._state["checksums"].get(name)
        if old not in (None, new):
            self._write_state({**self._state, "replacing": {**self._replacing, name: new}})
        write_atomic(path, data)
        if old != new or name in self._replacing:
            self._record_checksum(name, new)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write UTF-8 text; see :meth:`write_bytes`."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON; see :meth:`write_bytes`. Non-finite numbers are refused, with the path of their key."""
        return self.write_bytes(name, encode_json(value, str(self.path / name)))

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> Path:
        """Write arrays as ``.npz``, the same bytes for the same arrays; ValueError for arrays of Python objects."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, value in arrays.items():
                # np.savez refuses an array named "file", and stores the date, so that the bytes would differ.
                with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)
        return self.write_bytes(name, buffer.getvalue())

    def write_tensors(self, name: str, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
        """Write tensors as ``.safetensors``, with at most one metadata key; see :meth:`write_bytes`."""
        return self.write_bytes(name, encode_tensors(tensors, metadata))

    # ---- reading

    def read_bytes(self, name: str) -> bytes:
        """Read a file and verify its checksum; CheckpointError says how to make it again if it is damaged."""
        for _ in range(_MAX_READS):
            try:
                data = self._inside(name).read_bytes()
                if self._is_intact(name, data):
                    return data
                fault, cause = "damaged (its checksum is wrong)", None
            except FileNotFoundError as error:
                fault, cause = "missing", error
            except OSError as error:
                fault, cause = f"not readable ({os_error_reason(error)})", error
            if not self._reload_state():
                break
        if self._lock is not None:
            self._lock.check_in_place()
        raise self._damage(name, fault) from cause

    def read_text(self, name: str) -> str:
        """Read UTF-8 text; errors as for :meth:`read_bytes`."""
        return self._read(name, bytes.decode)

    def read_json(self, name: str) -> Any:
        """Read JSON; errors as for :meth:`read_bytes`."""
        return self._read(name, decode_json)

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read an ``.npz``; errors as for :meth:`read_bytes`."""
        return self._read(name, decode_arrays)

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        """Read a ``.safetensors``; errors as for :meth:`read_bytes`."""
        return self._read(name, decode_tensors)

    def _read(self, name: str, decode: Callable[[bytes], Any]) -> Any:
        try:
            return decode(self.read_bytes(name))
        except ValueError as error:
            raise self._damage(name, f"damaged ({error})") from error

    def has(self, name: str) -> bool:
        """Return whether the file exists, or is recorded and lost; ``eval.json`` and ``bench.json`` may be removed."""
        return self._inside(name).is_file() or (name in self._state["checksums"] and name not in _MEASUREMENTS)

    def recorded_files(self) -> list[str]:
        """Return the names of the files with a recorded checksum."""
        return list(self._state["checksums"])

    def checksum(self, name: str) -> str:
        """Return the SHA-256 of a file as it was written; errors as for :meth:`read_bytes`."""
        recorded = None if name in self._replacing else self._state["checksums"].get(name)
        return recorded or sha256(self.read_bytes(name))

    def checkpoints(self) -> CheckpointStore:
        """Return the training checkpoints of this run."""
        return CheckpointStore(self.path / "checkpoints", self._state.get("run"))

    # ---- metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``; CheckpointError if the file is damaged or a number is not finite."""
        self._require_write_access()
        path = self.path / METRICS
        data = encode_json(line, str(path), indent=None)
        try:
            is_new = not path.exists()
            before = b"" if is_new else path.read_bytes()
            # Otherwise the new checksum would cover the damage.
            if not self._is_intact(METRICS, before):
                raise self._damage(METRICS, "damaged (its checksum is wrong)")
            # A kill can leave half a line, which must not swallow this one.
            end = before.rfind(b"\n") + 1
            with open(path, "ab") as file:
                try:
                    file.truncate(end)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.truncate(path, end)
                    raise
            if is_new:
                fsync_folder(self.path)
        except OSError as error:
            raise write_error(error, path) from error
        self._record_checksum(METRICS, sha256(before[:end] + data))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl`` without an unfinished last one; CheckpointError if one is damaged."""
        if not self.has(METRICS):
            return []
        *lines, _ = self.read_bytes(METRICS).split(b"\n")
        metrics = []
        for number, line in enumerate(lines, 1):
            try:
                metrics.append(decode_json(line))
            except ValueError as error:
                raise self._damage(METRICS, f"damaged in line {number} ({error})") from error
        return metrics

    def truncate_metrics(self, stage: str, epoch: int) -> None:
        """Remove the lines of this training after ``epoch``, and lines and checkpoints of later trainings."""
        position = training_position(stage)
        self._discard_checkpoints(lambda training: training_position(training) > position)
        if position == training_position(STAGES[0]) and epoch == 0:
            # Without reading them, so that a run with damaged metrics can be repeated.
            if self.has(METRICS):
                self.write_bytes(METRICS, b"")
            return
        lines = self.read_metrics()
        kept = [
            line
            for line in lines
            if training_position(line["stage"]) < position or (line["stage"] == stage and line["epoch"] <= epoch)
        ]
        if len(kept) < len(lines):
            self.write_bytes(METRICS, b"".join(encode_json(line, METRICS, indent=None) for line in kept))

    # ---- state and checksums

    def _require_write_access(self) -> None:
        if self._lock is None:
            raise RunFolderError(f"{self.path} is open for reading only; open it with write=True")
        self._lock.check_in_place()

    def _write_state(self, state: dict[str, Any]) -> None:
        self._require_write_access()
        write_atomic(self.path / STATE, states.encode(state))
        self._state = state

    @property
    def _replacing(self) -> dict[str, str]:
        return self._state.get("replacing", {})

    def _record_checksum(self, name: str, digest: str) -> None:
        replacing = {key: value for key, value in self._replacing.items() if key != name}
        state = {key: value for key, value in self._state.items() if key != "replacing"}
        state["checksums"] = {**state["checksums"], name: digest}
        self._write_state({**state, "replacing": replacing} if replacing else state)

    def _resolve_replacements(self) -> None:
        """Record which version each file has that was being replaced when a process ended."""
        for name, new in self._replacing.items():
            found = None
            with contextlib.suppress(OSError):
                found = sha256((self.path / name).read_bytes())
            self._record_checksum(name, new if found == new else self._state["checksums"][name])

    def _record_files_written_once(self) -> None:
        for name in _WRITTEN_ONCE:
            if name not in self._state["checksums"] and (self.path / name).is_file():
                self._record_checksum(name, sha256(self.read_bytes(name)))

    def _is_intact(self, name: str, data: bytes) -> bool:
        if name not in self._state["checksums"]:
            return True
        valid = {self._state["checksums"][name], self._replacing.get(name)}
        return _are_metrics_intact(data, valid) if name == METRICS else sha256(data) in valid

    def _reload_state(self) -> bool:
        """Read the state again; True where another process has changed it, so that files may have changed too."""
        if self._lock is not None:
            return False
        try:
            state = states.read(self.path)
        except PrunekitError:
            return False
        before, self._state = self._state, state
        return before != state

    def _inside(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is not a path inside a run folder")
        return self.path / name

    def _damage(self, name: str, fault: str) -> CheckpointError:
        if name == RECIPE and fault.startswith("damaged"):
            return CheckpointError(
                f"{self.path / name} does not match its checksum in {STATE}: one of the two was edited, damaged or "
                "taken from another run; put the old one back, or start a new run with it: "
                f"prunekit run {self.path / name} --out DIR"
            )
        if stage := stage_that_writes(name):
            remedy = f"make it again with --from {stage}, or the whole run with --overwrite"
        elif name in _MEASUREMENTS:
            remedy = "remove it and measure again"
        else:
            remedy = "put a copy of it back, or start again with --overwrite"
        return CheckpointError(f"{self.path / name} is {fault}; {remedy}")

    # ---- removing

    def _remove_outputs_from(self, stage: str) -> None:
        """Remove the files that this stage and the later ones write; recipe and initial model stay."""
        first = stage_index(stage)
        names = [name for name, writer in FILE_STAGES.items() if stage_index(writer) >= first]
        self.remove(*names, *(_MEASUREMENTS if first <= stage_index("finetune") else ()))

    def remove(self, *names: str) -> None:
        """Remove files and folders of the run directly in its folder, except what the user keeps in them."""
        # The checksums first: a missing file with a checksum would count as damage.
        recorded = self.recorded_files()
        tables = {table: self._state[table] for table in ("checksums", "replacing") if table in self._state}
        kept = {t: {k: v for k, v in files.items() if k.partition("/")[0] not in names} for t, files in tables.items()}
        self._write_state({**self._state, **kept})
        try:
            remove_written(self.path, recorded, only=names)
        except OSError as error:
            raise write_error(error, error.filename or self.path, "remove") from error

    def _discard_checkpoints(self, condition: Callable[[str], bool]) -> None:
        checkpoints = self.checkpoints()
        for training in filter(condition, checkpoints.stages()):
            for step in checkpoints.steps(training):
                checkpoints.discard(training, step)


def _are_metrics_intact(data: bytes, checksums: set[str | None]) -> bool:
    """Return whether the lines begin with those of one of the checksums, followed by at most one more line."""
    digest = hashlib.sha256()
    *lines, _ = data.split(b"\n")
    covered = 0 if digest.hexdigest() in checksums else None
    for number, line in enumerate(lines, 1):
        digest.update(line + b"\n")
        if digest.hexdigest() in checksums:
            covered = number
    return covered is not None and len(lines) - covered <= 1
