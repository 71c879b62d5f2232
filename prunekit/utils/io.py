"""Writing that survives a kill and a full disk, and a lock on a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit import __version__
from prunekit.errors import CheckpointError, PrunekitError, RunFolderError, WriteError

TEMP_PREFIX = ".tmp-"
# What the system says of a disk that has no room left.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# … and of a place that was not for the user to name, or is not theirs. All else is a disk that fails.
_MISTAKES = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def sha256(data: bytes) -> str:
    """The SHA-256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def cache_folder() -> Path:
    """Where prunekit keeps what can be made again: $PRUNEKIT_CACHE, or ``prunekit`` in the user's cache folder."""
    given = os.environ.get("PRUNEKIT_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prunekit"


def os_error_reason(error: OSError) -> str:
    """What the system says, without the path that the caller names anyway."""
    return error.strerror or str(error) or type(error).__name__


def is_disk_failure(error: BaseException) -> bool:
    """Whether this says that a disk is full or fails, and so nothing of what the user has asked for."""
    return isinstance(error, OSError) and error.errno in (*_FULL, errno.EIO)


def write_error(error: OSError, what: object, action: str = "write") -> CheckpointError:
    """What the user is told where the system refuses to write.

    Returns:
        a :class:`WriteError` (exit status 3) for a disk that is full or fails, which no command is to blame for; for
        permissions and names a plain CheckpointError (2). (Two others were weighed: 3 for all of them would call a
        mistyped --out a failure, and 2 for all, as it was, lets scripts that try again on 3 give up on a full disk.)
    """
    said = f"cannot {action} {what}: {os_error_reason(error)}"
    if error.errno in _MISTAKES:
        return CheckpointError(f"{said}; mend the path or its permissions and give the command again (a run: --resume)")
    mend = "free space" if error.errno in _FULL else "see to the disk"
    return WriteError(f"{said}; {mend}, then give the command again (a run goes on with --resume)")


def format_problem(value: Any, newest: int) -> str | None:
    """What is wrong with the ``format`` of a file, of which there are those from 1 to ``newest``; None where nothing
    is. :func:`is_newer` tells a newer one from one that never was."""
    if is_newer(value, newest):
        return f"has format {value}, this prunekit ({__version__}) reads up to {newest}"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return f"is damaged (its format is {json.dumps(value, default=str)[:40]})"
    return None


def is_newer(value: Any, newest: int) -> bool:
    """Whether a ``format`` is one of a later prunekit."""
    return isinstance(value, int) and not isinstance(value, bool) and value > newest


def write_atomic(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that a reader, or a kill at any moment, finds the old file or the new one, whole.

    Raises:
        CheckpointError: the system refused, see :func:`refusal`; the old file stands, no temporary one is left.
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
    """Make a folder with its parents; their names are durable then, too."""
    if not folder.is_dir():
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        # In a folder that may be written into and not read it cannot be opened.
        with contextlib.suppress(PermissionError):
            fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: without this a power cut can undo an ``os.replace``."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no fsync of a folder; the file itself is written all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def encode_json(value: Any, name: str, indent: int | None = 2) -> bytes:
    """``value`` as JSON; NumPy's scalars and arrays become numbers and lists.

    Raises:
        CheckpointError: a number is not finite, or something is no JSON; ``name`` and the path of the key are named.
    """
    for key, number in _non_finite(value, ""):
        raise CheckpointError(
            f"{name}: {key or 'the value'} is {number}, which JSON cannot hold; leave it out or use null"
        )
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=_plain).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}; use numbers, texts, lists and dicts only") from error


def _plain(value: Any) -> Any:
    """A NumPy scalar or array as plain values."""
    # Not at the top: the command line's help needs this file, and comes without NumPy.
    import numpy as np

    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _non_finite(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if not isinstance(value, (str, int, float, dict, list, tuple, type(None))):
        try:
            value = _plain(value)
        except TypeError:
            return  # Which the encoder says.
    if isinstance(value, float):
        if not math.isfinite(value):
            yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _non_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _non_finite(item, f"{key}[{index}]")


def process_alive(pid: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class FolderLock:
    """The right of one process to write into a folder, held through ``flock`` on its file ``lock``.

    The kernel drops an flock when its holder dies, so a lock left by a crash on this host does not stand in the way,
    even when another process has got the same number since. The file says who holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunFolderError: another process holds it, or did so last on another host, where nobody can look from here.
            WriteError: a disk is full or fails.
        """
        while self._handle is None:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise self._refusal(error) from error
            try:
                if self._take(handle):
                    self._handle = handle
            except OSError as error:
                raise self._refusal(error) from error
            finally:
                if self._handle is None:
                    os.close(handle)

    def _take(self, handle: int) -> bool:
        """False where the file was removed between opening and locking it, so that it is to be tried again."""
        kernel = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(self._holder(handle))
        except OSError:
            # A file system without flock: the process number alone has to do.
            kernel = False
        try:
            if os.fstat(handle).st_ino != os.stat(self.path).st_ino:
                return False
        except FileNotFoundError:
            return False
        pid, host = self._holder(handle)
        if host and (host != socket.gethostname() or (not kernel and process_alive(pid))):
            self._refuse((pid, host))
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise
        return True

    def _refusal(self, error: OSError) -> PrunekitError:
        if is_disk_failure(error):
            return write_error(error, self.path.parent, "lock")
        return RunFolderError(
            f"cannot lock {self.path.parent}: {os_error_reason(error)}; mend its permissions or work in another folder"
        )

    @staticmethod
    def _holder(handle: int) -> tuple[int, str]:
        try:
            held = json.loads(os.pread(handle, 4096, 0))
            return int(held["pid"]), str(held["host"])
        except (ValueError, KeyError, TypeError):
            return 0, ""

    def _refuse(self, holder: tuple[int, str]) -> None:
        pid, host = holder
        by = f"process {pid} on {host}" if host else "another process"
        raise RunFolderError(
            f"{self.path.parent} is in use by {by}; wait for it, or work in another folder"
            + (f"; if that process has ended, remove {self.path}" if host != socket.gethostname() and host else "")
        )

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            # Removed while still locked, or a waiting process could lock a file that is about to go.
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Explicitly, since forked data-loader workers hold the same lock open.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)
        self._handle = None
