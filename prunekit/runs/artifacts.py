"""The files of a run folder: written whole or not at all, and read with their checksums held against them.

Before a file is replaced, ``state.json`` is told what it will be, and after that what it is: whenever the process is
killed, the file is one of the two, and can be told from a damaged one. (To drop the checksum meanwhile, as it was,
leaves a file that nothing vouches for after a kill, and a reader between the two takes the new file for damaged.)
``metrics.jsonl`` grows by lines: its checksum is that of the lines that were written, and behind those there may be one
line more, which a kill has left without its checksum. (A checksum in each line was the other way: it says nothing of
lines that are gone.)
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile
from hashlib import sha256 as hashed
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.errors import CheckpointError, PrunekitError, RunFolderError
from prunekit.runs import state as states
from prunekit.runs.checkpoints import CheckpointStore, encode_tensors
from prunekit.runs.stage_order import FILE_STAGES, STAGES, stage_index, stage_that_writes, training_position
from prunekit.runs.state import STATE
from prunekit.utils.decode import decode_arrays, decode_json, decode_tensors
from prunekit.utils.io import encode_json, fsync_folder, os_error_reason, sha256, write_atomic, write_error
from prunekit.utils.lock import FolderLock

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"
_UNCHECKED = (STATE, "run.log")
# What no stage writes again: ended between file and checksum, a process leaves them for good without the latter.
_ONCE = (RECIPE, "classes.json", "init.json", "init/model.safetensors")
_LOOKS = 20  # at a file that another process is replacing again and again
# What the models of a run were measured to do holds for those models only; a user may remove it.
_OF_MODELS = ("eval.json", "bench.json")


class ArtifactStore:
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
        write_atomic(self.path / STATE, states.encode(state))
        self._state = state

    def _vouch(self, name: str, digest: str) -> None:
        """Note what a file now is."""
        replacing = {k: v for k, v in self._state.get("replacing", {}).items() if k != name}
        state = {k: v for k, v in self._state.items() if k != "replacing"}
        state["checksums"] = {**state["checksums"], name: digest}
        self._write_state({**state, "replacing": replacing} if replacing else state)

    def _settle(self) -> None:
        """Note of the files that were to be replaced when a process ended what they have become."""
        for name, digest in self._state.get("replacing", {}).items():
            with contextlib.suppress(OSError):
                if sha256((self.path / name).read_bytes()) == digest:
                    self._vouch(name, digest)
                    continue
            self._vouch(name, self._state["checksums"][name])

    def _vouch_for_beginnings(self) -> None:
        """Note what the files are that the run begins with, where a process ended before it had done so."""
        for name in _ONCE:
            if name not in self._state["checksums"] and (self.path / name).is_file():
                self._vouch(name, sha256(self.read_bytes(name)))

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
        if name in _UNCHECKED or name.startswith("report/"):
            write_atomic(path, data)
            return path
        new, held = sha256(data), self._state["checksums"].get(name)
        if held not in (None, new):
            self._write_state({**self._state, "replacing": {**self._state.get("replacing", {}), name: new}})
        write_atomic(path, data)
        if held != new or name in self._state.get("replacing", {}):
            self._vouch(name, new)
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
        for _ in range(_LOOKS):
            try:
                data = self._inside(name).read_bytes()
            except FileNotFoundError as error:
                fault, cause = "missing", error
            except OSError as error:
                fault, cause = f"not readable ({os_error_reason(error)})", error
            else:
                if self._is_vouched(name, data):
                    return data
                fault, cause = "damaged (its bytes are not those that were written)", None
            if not self._look_again():
                break
        raise self._damage(name, fault) from cause

    def _is_vouched(self, name: str, data: bytes) -> bool:
        """Whether these are bytes that were written; True where nothing is known of the file."""
        sums = self._state["checksums"]
        if name not in sums:
            return True
        held = {sums[name], self._state.get("replacing", {}).get(name)}
        return _begins(data, held) if name == METRICS else sha256(data) in held

    def _look_again(self) -> bool:
        """Whether another process has written since the state was read, so that a file may be another one by now."""
        if self._lock is not None:
            return False
        try:
            state = states.read(self.path)
        except PrunekitError:
            return False
        before, self._state = self._state, state
        return before != state

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
        """Whether the folder holds this file, or should: one that was written and is gone is no less damaged than one
        whose bytes have changed, and to read it says so. Of ``eval.json`` and ``bench.json`` only what is there
        counts."""
        return self._inside(name).is_file() or (name in self._state["checksums"] and name not in _OF_MODELS)

    def states(self) -> CheckpointStore:
        """The training states of this run."""
        return CheckpointStore(self.path / "checkpoints", self._state.get("run"))

    def written(self) -> list[str]:
        """The files that a checksum speaks for."""
        return list(self._state["checksums"])

    def checksum(self, name: str) -> str:
        """The SHA-256 of a file as it was written; errors as for :meth:`read_bytes`."""
        held = None if name in self._state.get("replacing", {}) else self._state["checksums"].get(name)
        return held or sha256(self.read_bytes(name))

    def _inside(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is no path inside a run folder")
        return self.path / name

    def _forget_from(self, stage: str) -> None:
        """Remove what this stage and the later ones have written; the model that a run began with stays."""
        first = stage_index(stage)
        gone = [n for n, by in FILE_STAGES.items() if stage_index(by) >= first]
        gone += _OF_MODELS if first <= stage_index("finetune") else ()
        self._write_state(
            {
                key: {k: v for k, v in value.items() if k.partition("/")[0] not in gone}
                if key in ("checksums", "replacing")
                else value
                for key, value in self._state.items()
            }
        )
        try:
            for name in gone:
                path = self.path / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, path, "remove") from error

    def _damage(self, name: str, what: str) -> CheckpointError:
        if name == RECIPE and what.startswith("damaged"):
            return CheckpointError(
                f"{self.path / name} is not what {STATE} vouches for: one of the two was edited, damaged or taken from "
                "another run; put the old one back, or start a run of its own with it: "
                f"prunekit run {self.path / name} --out DIR"
            )
        if by := stage_that_writes(name):
            again = f"make it again with --from {by}, or the whole run with --overwrite"
        elif name in _OF_MODELS:
            again = "remove it and measure again"
        else:
            again = "put a copy of it back, or start again with --overwrite"
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
            before = b"" if new else path.read_bytes()
            # Not to vouch from now on for what has changed meanwhile.
            if not self._is_vouched(METRICS, before):
                raise self._damage(METRICS, "damaged (its bytes are not those that were written)")
            # A kill can leave half a line; without its end it would swallow this one.
            whole = before.rfind(b"\n") + 1
            with open(path, "ab") as file:
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
                fsync_folder(self.path)
        except OSError as error:
            raise write_error(error, path) from error
        self._vouch(METRICS, sha256(before[:whole] + data))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; half a line at the end, which a kill leaves, is left out.

        Raises:
            CheckpointError: a line is damaged.
        """
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
        """Drop the lines of this stage after ``epoch``, and lines and states of later trainings: a resumed run writes
        them again."""
        first = training_position(stage)
        for later in self.states().stages():
            for step in self.states().steps(later) if training_position(later) > first else ():
                self.states().discard(later, step)
        if first == training_position(STAGES[0]) and epoch == 0:
            # Unread, so that the run can be made again where they are damaged.
            if self.has(METRICS):
                self.write_bytes(METRICS, b"")
            return
        lines = self.read_metrics()
        kept = [
            m for m in lines if training_position(m["stage"]) < first or (m["stage"] == stage and m["epoch"] <= epoch)
        ]
        if len(kept) < len(lines):
            self.write_bytes(METRICS, b"".join(encode_json(line, METRICS, indent=None) for line in kept))


def _begins(data: bytes, sums: set[str | None]) -> bool:
    """Whether these lines begin with those of one of the checksums, with at most one whole line more behind them."""
    digest = hashed()
    *lines, _ = data.split(b"\n")
    held = 0 if digest.hexdigest() in sums else None
    for number, line in enumerate(lines, 1):
        digest.update(line + b"\n")
        if digest.hexdigest() in sums:
            held = number
    return held is not None and len(lines) - held <= 1
