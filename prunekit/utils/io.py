"""Atomic, crash-safe writing of files, and JSON encoding. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit import __version__
from prunekit.errors import CheckpointError, WriteError

TEMP_PREFIX = ".tmp-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc"),
    *("failed to map segment", "can't start new thread", "could not create a primitive"),
)
# A path or permission is wrong; any other error is a failing disk.
_USER_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cache_folder() -> Path:
    """Return the folder for reproducible data: $PRUNEKIT_CACHE, or ``prunekit`` in the user's cache folder."""
    if folder := os.environ.get("PRUNEKIT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prunekit"


def os_error_reason(error: OSError) -> str:
    """Return the system's message without the path."""
    return error.strerror or str(error) or type(error).__name__


def is_disk_failure(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (*_DISK_FULL, errno.EIO)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; the libraries share no exception type for this."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def write_error(error: OSError, path: object, action: str = "write") -> CheckpointError:
    """Return the error to raise when the system refuses to write: a :class:`WriteError` if a disk is the cause."""
    problem = f"cannot {action} {path}: {os_error_reason(error)}"
    if error.errno in _USER_ERRORS:
        return CheckpointError(f"{problem}; fix the path or its permissions and repeat the command (a run: --resume)")
    fix = "free space" if error.errno in _DISK_FULL else "check the disk"
    return WriteError(f"{problem}; {fix}, then repeat the command (a run: --resume)")


def format_problem(value: Any, newest: int) -> str | None:
    """Return what is wrong with a file's ``format``, which may be 1 to ``newest``, or None."""
    if is_newer(value, newest):
        return f"has format {value}, this prunekit ({__version__}) reads up to {newest}"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return f"is damaged (its format is {json.dumps(value, default=str)[:40]})"
    return None


def is_newer(value: Any, newest: int) -> bool:
    """Return whether a ``format`` is that of a later version of prunekit."""
    return isinstance(value, int) and not isinstance(value, bool) and value > newest


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: temporary file, fsync, rename, fsync of the folder.

    A reader, or a kill at any moment, finds either the complete old file or the complete new one.

    Raises:
        CheckpointError: see :func:`write_error`; the old file is unchanged and no temporary file is left.
    """
    temporary = path.with_name(f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        make_folder(path.parent)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)
    except OSError as error:
        raise write_error(error, path) from error


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably."""
    if not folder.is_dir():
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        # A folder that is writable but not readable cannot be opened.
        with contextlib.suppress(PermissionError):
            fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable; otherwise a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def encode_json(value: Any, name: str, indent: int | None = 2) -> bytes:
    """Encode as JSON; NumPy scalars and arrays become numbers and lists.

    Raises:
        CheckpointError: a number is not finite or a type is not supported; ``name`` and the key are in the message.
    """
    try:
        text = json.dumps(value, indent=indent, default=_from_numpy)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}; use numbers, strings, lists and dicts only") from error
    # Only a text with one of these words needs the search.
    if "NaN" in text or "Infinity" in text:
        for key, number in _find_non_finite(json.loads(text)):
            raise CheckpointError(f"{name}: {key} is {number}, which JSON does not support; omit it or use null")
    return text.encode() + b"\n"


def _from_numpy(value: Any) -> Any:
    # Imported here, because the command line's help runs without NumPy.
    import numpy as np

    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _find_non_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield key or "the value", value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _find_non_finite(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _find_non_finite(item, f"{key}[{index}]")
