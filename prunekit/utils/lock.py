"""A lock that lets only one process write into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from prunekit.errors import PrunekitError, RunError, RunFolderError
from prunekit.utils.io import is_disk_failure, os_error_reason, write_error


def process_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class FolderLock:
    """An ``flock`` on the file ``lock`` in a folder; the file names the process and host that hold it.

    The kernel releases an flock when its process dies, so a lock left by a crash on this host does not block. On file
    systems without flock, the process number decides.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._descriptor: int | None = None
        self._folder: tuple[int, int] | None = None  # device and inode

    def acquire(self) -> None:
        """Raise RunFolderError if another process holds the lock or one on another host left it."""
        while self._descriptor is None:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    if self._try_acquire(descriptor):
                        self._descriptor, self._folder = descriptor, self._find_folder()
                finally:
                    if self._descriptor is None:
                        os.close(descriptor)
            except OSError as error:
                raise self._error(error) from error

    def check_in_place(self) -> None:
        """Raise RunError if the folder was moved, replaced or removed while it is locked."""
        if self._descriptor is not None and self._find_folder() != self._folder:
            now, before = self._lock_file().parent, self.path.parent
            if now == before:
                raise RunError(f"{before} was moved or removed; continue where it is now, with --resume --out DIR")
            raise RunError(f"{before} was moved to {now}; continue there with --resume --out {now}")

    def _find_folder(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path.parent)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _lock_file(self) -> Path:
        """Return where the file is now, where the system tells."""
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            if path.is_file():
                return path
        return self.path

    def _try_acquire(self, descriptor: int) -> bool:
        """Return False if the file was removed between opening and locking."""
        has_flock = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use(*self._read_holder(descriptor)) from None
        except OSError:
            has_flock = False
        try:
            if os.fstat(descriptor).st_ino != os.stat(self.path).st_ino:
                return False
        except FileNotFoundError:
            return False
        pid, host = self._read_holder(descriptor)
        if host and (host != socket.gethostname() or (not has_flock and process_alive(pid))):
            raise self._in_use(pid, host)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise
        return True

    @staticmethod
    def _read_holder(descriptor: int) -> tuple[int, str]:
        try:
            holder = json.loads(os.pread(descriptor, 4096, 0))
            return int(holder["pid"]), str(holder["host"])
        except (ValueError, KeyError, TypeError):
            return 0, ""

    def _in_use(self, pid: int, host: str) -> RunFolderError:
        holder = f"process {pid} on {host}" if host else "another process"
        fix = f"; if that process has ended, remove {self.path}" if host not in ("", socket.gethostname()) else ""
        return RunFolderError(f"{self.path.parent} is in use by {holder}; wait for it, or use another folder{fix}")

    def _error(self, error: OSError) -> PrunekitError:
        if is_disk_failure(error):
            return write_error(error, self.path.parent, "lock")
        return RunFolderError(
            f"cannot lock {self.path.parent}: {os_error_reason(error)}; fix its permissions or use another folder"
        )

    def release(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            # Remove the file while it is locked, or another process could lock a file about to be removed.
            path = self._lock_file()
            if path.stat().st_ino == os.fstat(self._descriptor).st_ino:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Unlock explicitly, because forked data-loader workers share the descriptor.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None
