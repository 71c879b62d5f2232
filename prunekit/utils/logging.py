"""Logging: the level of the terminal, and the log of a run, which contains everything."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prunekit.errors import PrunekitWarning

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# For a Reporter's messages. Its level is the terminal's; it is not set when prunekit is used as a library.
progress_logger = logging.getLogger("prunekit.progress")


def is_quiet() -> bool:
    """Return whether the terminal shows only warnings and errors."""
    return progress_logger.level > logging.INFO


@contextmanager
def terminal_logging(level: int) -> Iterator[None]:
    """Within ``with``, print messages and warnings from this level to stderr."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if level > logging.WARNING:
            return
        if issubclass(category, PrunekitWarning):
            _print(str(message))
        else:
            original(message, category, filename, lineno, file, line)

    root, old_level, handler = logging.getLogger(), progress_logger.level, _TerminalHandler(level)
    with warnings.catch_warnings():
        original, warnings.showwarning = warnings.showwarning, show
        root.addHandler(handler)
        progress_logger.setLevel(level)
        try:
            yield
        finally:
            progress_logger.setLevel(old_level)
            root.removeHandler(handler)


@contextmanager
def record_logs(write: Callable[[str], None]) -> Iterator[None]:
    """Within ``with``, pass every message and warning to ``write``, and the traceback of an exception."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        source = "" if issubclass(category, PrunekitWarning) else f" ({category.__name__}, {filename}:{lineno})"
        for part in str(message).splitlines():
            write(f"warning: {part}{source}")
        original(message, category, filename, lineno, file, line)

    root, handler = logging.getLogger(), _RecordHandler(write)
    original, warnings.showwarning = warnings.showwarning, show
    root.addHandler(handler)
    try:
        yield
    except Exception:
        for line in traceback.format_exc().splitlines():
            write(line)
        raise
    finally:
        root.removeHandler(handler)
        # Other code may have replaced it since.
        if warnings.showwarning is show:
            warnings.showwarning = original


def _print(text: str) -> None:
    for line in text.splitlines():
        print(f"prunekit: {line}", file=sys.stderr)


def _message(record: logging.LogRecord) -> str:
    is_ours = record.name.partition(".")[0] == "prunekit"
    return record.getMessage() if is_ours else f"{record.name}: {record.getMessage()}"


class _TerminalHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print(_message(record))


class _RecordHandler(logging.Handler):
    def __init__(self, write: Callable[[str], None]):
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == progress_logger.name:
            return  # The reporter has already written it.
        for line in _message(record).splitlines():
            self.write(f"{record.levelname.lower()}: {line}")
        if record.levelno >= logging.WARNING and not self._has_other_handler(record):
            # As logging does without any handler.
            logging.lastResort.handle(record)

    def _has_other_handler(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False
