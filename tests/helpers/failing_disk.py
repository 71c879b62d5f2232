"""Simulate a full or failing disk: from the n-th call that writes below a folder on, calls fail."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

_WRITING = frozenset("wax+")


class FailingDisk:
    """A context manager that counts the calls that write and lets some of them fail.

    Args:
        root: folder whose calls are counted, in all threads.
        at: index of the first call that fails, or None.
        error: the errno. A full disk stays full; an I/O error (EIO) occurs once.
        only: selects paths relative to ``root``.

    Attributes:
        calls: calls with their paths: "write run.log", "fsync state.json", "replace state.json" …; a temporary file is
            named by its folder.
        failed: number of failed calls.
    """

    def __init__(
        self, root: Path, at: int | None = None, error: int = errno.ENOSPC, only: Callable[[str], bool] | None = None
    ):
        self.root, self.at, self.error, self.only = Path(root).resolve(), at, error, only
        self.calls: list[str] = []
        self.failed = 0

    def __enter__(self) -> FailingDisk:
        self._patch = pytest.MonkeyPatch()
        opened, fsync, replace, mkdir = io.open, os.fsync, os.replace, os.mkdir
        create, pwrite, unlink = os.open, os.pwrite, os.unlink

        def by_number(fd: int) -> str:
            return os.readlink(f"/proc/self/fd/{fd}") if Path("/proc/self/fd").is_dir() else ""

        def failing_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
            if isinstance(file, int) or not _WRITING & set(mode) or not self._is_mine(file):
                return opened(file, mode, buffering, encoding, errors, newline, **more)
            self._call("open", file)
            if "+" in mode:
                return opened(file, mode, buffering, encoding, errors, newline, **more)
            binary = io.BufferedWriter(_Raw(self, file, mode.replace("b", "").replace("t", "")))
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)

        def failing_create(path, flags, *more, **options):
            if flags & os.O_CREAT and options.get("dir_fd") is None:
                self._call("create", path)
            return create(path, flags, *more, **options)

        def failing_unlink(path, **options):
            # Removing a file needs no space.
            if self.error == errno.EIO and options.get("dir_fd") is None:
                self._call("unlink", path)
            return unlink(path, **options)

        def failing_mkdir(path, *more, **options):
            if not Path(path).exists():
                self._call("mkdir", path)
            return mkdir(path, *more, **options)

        for module in (builtins, io):
            self._patch.setattr(module, "open", failing_open)
        self._patch.setattr(os, "fsync", lambda fd: (self._call("fsync", by_number(fd)), fsync(fd))[1])
        self._patch.setattr(os, "replace", lambda a, b, **o: (self._call("replace", b), replace(a, b, **o))[1])
        self._patch.setattr(os, "mkdir", failing_mkdir)
        self._patch.setattr(os, "pwrite", lambda fd, *a: (self._call("pwrite", by_number(fd)), pwrite(fd, *a))[1])
        self._patch.setattr(os, "open", failing_create)
        self._patch.setattr(os, "unlink", failing_unlink)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _is_mine(self, path: object) -> bool:
        path = Path(os.fsdecode(path))
        path = path if path.is_absolute() else Path.cwd() / path
        if not path.is_relative_to(self.root):
            return False
        return self.only is None or self.only(path.relative_to(self.root).as_posix())

    def _call(self, what: str, path: object) -> None:
        if not self._is_mine(path):
            return
        named = Path(os.path.abspath(os.fsdecode(path))).relative_to(self.root)
        named = named.parent if named.name.startswith(".tmp-") else named
        self.calls.append(f"{what} {named.as_posix()}")
        index = len(self.calls) - 1
        if self.at is not None and (index == self.at or (index > self.at and self.error != errno.EIO)):
            self.failed += 1
            raise OSError(self.error, os.strerror(self.error), os.fsdecode(path))


class _Raw(io.FileIO):
    def __init__(self, disk: FailingDisk, path: object, mode: str):
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data) -> int:
        try:
            self._disk._call("write", self._path)
        except OSError:
            # A full disk writes as much as fits.
            super().write(bytes(data)[: len(data) // 2])
            raise
        return super().write(data)
