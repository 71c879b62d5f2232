"""Output whose reader may go away: ``| head``, a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _LossyStream:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        # Also what is still buffered, which the interpreter would fail to write when it exits.
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), self._stream.fileno())


@contextlib.contextmanager
def ignore_lost_readers() -> Iterator[None]:
    """Within ``with``, writing to stdout and stderr never fails."""
    stdout, stderr = _LossyStream(sys.stdout), _LossyStream(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


def flush_or_discard() -> None:
    """Write what is buffered for stdout and stderr, or drop it if nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        _LossyStream(stream).flush()
