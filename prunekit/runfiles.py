"""The files of a run folder: written whole or not at all, and read with their checksums held against them.

A checksum in ``state.json`` is dropped before its file is replaced and set again after, so that a checksum that stands
always speaks for the bytes that stand, whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoints import encode_tensors
from prunekit.decoding import decode_arrays, decode_json, decode_tensors
from prunekit.errors import CheckpointError, RunFolderError
from prunekit.files import FolderLock, encode_json, reason, sha256, sync_folder, write_atomic

STAGES = ("train", "extract", "slim", "finetune", "evaluate", "export", "report")
RECIPE, STATE, SUMMARY, METRICS = "recipe.yaml", "state.json", "summary.json", "metrics.jsonl"
_UNCHECKED = (STATE, METRICS, "run.log")
_MADE_BY = {
    "init": "train",
    "init.json": "train",
    "classes.json": "train",
    "gates.npz": "train",
    "shrunk.json": "train",
    "dense": "train",
    "plan.json": "extract",
    "layers.json": "slim",
    "slim": "slim",
    "finetuned": "finetune",
    "curves.json": "evaluate",
    "gallery": "evaluate",
    "model.onnx": "export",
    "exports": "export",
}
# Parts of summary.json → the stage that makes them.
PARTS = {
    "baseline": "train",
    "dense": "train",
    "shrunk": "train",
    "slim": "slim",
    "kept": "slim",
    "proof": "slim",
    "drift": "slim",
    "recalibrated": "finetune",
    "finetuned": "finetune",
    "reference": "evaluate",
    "export": "export",
}
# What the models of a run were measured to do holds for those models only.
_OF_MODELS = ("eval.json", "bench.json")


class RunFiles:
    """Reads and, with a lock, writes the files of one run folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, state: dict[str, Any], lock: FolderLock | None):
        self.path = path
        self._state = state
        self._lock = lock

    def _may_write(self) -> None:
        if self._lock is None:
            raise RunFolderError(f"{self.path} was opened to be read; open it with write=True")

    def _write_state(self, state: dict[str, Any]) -> None:
        self._may_write()
        write_atomic(self.path / STATE, encode_json(state, STATE))
        self._state = state

    # ---- files

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file of this folder, whole or not at all, and note its checksum.

        Args:
            name: relative path with ``/``; folders on the way are made.
            data: the whole file.

        Returns:
            Its path.

        Raises:
            CheckpointError: the system refused; a file that was there before still is.
        """
        path = self._inside(name)
        self._may_write()
        checksums = self._state["checksums"]
        new = sha256(data)
        if name in checksums and checksums[name] != new:
            self._write_state({**self._state, "checksums": {k: v for k, v in checksums.items() if k != name}})
        write_atomic(path, data)
        if name not in _UNCHECKED and not name.startswith("report/") and checksums.get(name) != new:
            self._write_state({**self._state, "checksums": {**self._state["checksums"], name: new}})
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text in UTF-8; as :meth:`write_bytes`."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON; as :meth:`write_bytes`, and a number that is not finite is refused with the path of its key."""
        return self.write_bytes(name, encode_json(value, str(self.path / name)))

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> Path:
        """Write arrays as ``.npz``, the same bytes for the same arrays; as :meth:`write_bytes`.

        Raises:
            ValueError: an array holds Python objects, which only a pickle could keep.
        """
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, value in arrays.items():
                # Not np.savez: it takes no array named "file", and a ZipInfo without a date keeps the bytes the same.
                with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)
        return self.write_bytes(name, buffer.getvalue())

    def write_tensors(self, name: str, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
        """Write tensors as ``.safetensors``, with at most one metadata key; as :meth:`write_bytes`."""
        return self.write_bytes(name, encode_tensors(tensors, metadata))

    def read_bytes(self, name: str) -> bytes:
        """Read a file of this folder and compare it with its checksum, where there is one.

        Raises:
            CheckpointError: the file is missing or damaged; the message says how to make it again.
        """
        try:
            data = self._inside(name).read_bytes()
        except FileNotFoundError as error:
            raise self._damage(name, "missing") from error
        except OSError as error:
            raise self._damage(name, f"not readable ({reason(error)})") from error
        if self._state["checksums"].get(name, digest := sha256(data)) != digest:
            raise self._damage(name, "damaged (its bytes are not those that were written)")
        return data

    def read_text(self, name: str) -> str:
        """Read a text in UTF-8; errors as for :meth:`read_bytes`."""
        try:
            return self.read_bytes(name).decode()
        except UnicodeDecodeError as error:
            raise self._damage(name, f"damaged (no UTF-8 at byte {error.start})") from error

    def read_json(self, name: str) -> Any:
        """Read JSON; errors as for :meth:`read_bytes`."""
        try:
            return decode_json(self.read_text(name))
        except ValueError as error:
            raise self._damage(name, f"damaged ({error})") from error

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Read an ``.npz``; errors as for :meth:`read_bytes`."""
        try:
            return decode_arrays(self.read_bytes(name))
        except ValueError as error:
            raise self._damage(name, f"damaged ({error})") from error

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        """Read a ``.safetensors``; errors as for :meth:`read_bytes`."""
        try:
            return decode_tensors(self.read_bytes(name))
        except ValueError as error:
            raise self._damage(name, f"damaged ({error})") from error

    def has(self, name: str) -> bool:
        """Whether the folder holds this file."""
        return self._inside(name).is_file()

    def checksum(self, name: str) -> str:
        """The SHA-256 of a file as it was written; errors as for :meth:`read_bytes`."""
        return self._state["checksums"].get(name) or sha256(self.read_bytes(name))

    def _inside(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is no path inside a run folder")
        return self.path / name

    def _forget_from(self, stage: str) -> None:
        """Remove what this stage and the later ones have written; the model that a run began with stays."""
        first = stage_index(stage)
        gone = [n for n, by in _MADE_BY.items() if stage_index(by) >= first and not n.startswith("init")]
        gone += _OF_MODELS if first <= stage_index("finetune") else ()
        kept = {k: v for k, v in self._state["checksums"].items() if k.partition("/")[0] not in gone}
        self._write_state({**self._state, "checksums": kept})
        try:
            for name in gone:
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot remove {path}: {reason(error)}; mend its permissions") from error

    def _damage(self, name: str, what: str) -> CheckpointError:
        stage = _MADE_BY.get(name.partition("/")[0])
        again = f"make it again with --from {stage}, or the whole run with --overwrite" if stage else "use --overwrite"
        return CheckpointError(f"{self.path / name} is {what}; {again}")

    # ---- metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``.

        Raises:
            CheckpointError: the system refused, or a number is not finite; the lines before still stand.
        """
        self._may_write()
        path = self.path / METRICS
        data = encode_json(line, str(path), indent=None)
        try:
            new = not path.exists()
            with open(path, "ab") as file:
                # A kill can leave half a line; without its end it would swallow this one.
                whole = _whole_lines(path)
                try:
                    file.truncate(whole)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        os.truncate(path, whole)
                    raise
            if new:
                sync_folder(self.path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {reason(error)}; free space, then go on with --resume"
            ) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; half a line at the end, which a kill leaves, is left out.

        Raises:
            CheckpointError: a line is damaged.
        """
        if not (self.path / METRICS).exists():
            return []
        *lines, _ = self.read_bytes(METRICS).split(b"\n")
        metrics = []
        for number, line in enumerate(lines, 1):
            try:
                metrics.append(decode_json(line))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path / METRICS}, line {number}, is damaged ({error}); remove that line, or use --overwrite"
                ) from error
        return metrics

    def truncate_metrics(self, stage: str, epoch: int) -> None:
        """Drop the lines of this stage after ``epoch``, and those of later stages: a resumed run writes them again."""
        first = place(stage)
        lines = self.read_metrics()
        kept = [m for m in lines if place(m["stage"]) < first or (m["stage"] == stage and m["epoch"] <= epoch)]
        if len(kept) < len(lines):
            self.write_bytes(METRICS, b"".join(encode_json(line, METRICS, indent=None) for line in kept))


def stage_index(stage: str) -> int:
    """The place of a stage in :data:`STAGES`.

    Raises:
        RunFolderError: no such stage.
    """
    if stage not in STAGES:
        raise RunFolderError(f"unknown stage {stage!r}; the stages are {', '.join(STAGES)}")
    return STAGES.index(stage)


def place(name: str) -> tuple[int, int]:
    """Where a training stands among the stages: it is one, or "step1", "step2" … within the stage slim; raises as
    :func:`stage_index` does."""
    number = name.removeprefix("step")
    return (stage_index("slim"), int(number)) if number != name and number.isdecimal() else (stage_index(name), 0)


def _whole_lines(path: Path) -> int:
    """The number of bytes up to the end of the last whole line."""
    with open(path, "rb") as file:
        return file.read().rfind(b"\n") + 1
