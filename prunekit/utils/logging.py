"""What is said aloud and how loud: from which level on the terminal shows it, and a run's log, which gets all of it."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prunekit.errors import PrunekitWarning

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# The course of a run: what a Reporter tells, at info, and what it notes for the log alone, at debug. Its own level is
# the terminal's, and none where prunekit is used from Python.
progress_logger = logging.getLogger("prunekit.progress")


def is_quiet() -> bool:
    """Whether the terminal is to show no more than warnings."""
    return progress_logger.level > logging.INFO


@contextmanager
def terminal_logging(level: int) -> Iterator[None]:
    """Within ``with``, messages and warnings from this level on come to stderr, ours as lines of ours."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if level > logging.WARNING:
            return
        if issubclass(category, PrunekitWarning):
            _say(str(message))
        else:
            others(message, category, filename, lineno, file, line)

    root, before, handler = logging.getLogger(), progress_logger.level, _Terminal(level)
    with warnings.catch_warnings():
        others, warnings.showwarning = warnings.showwarning, show
        root.addHandler(handler)
        progress_logger.setLevel(level)
        try:
            yield
        finally:
            progress_logger.setLevel(before)
            root.removeHandler(handler)


@contextmanager
def record_logs(note: Callable[[str], None]) -> Iterator[None]:
    """Within ``with``, ``note`` takes a line for each message and each warning, whether the terminal shows it or not,
    and the traceback of what breaks it off."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        at = "" if issubclass(category, PrunekitWarning) else f" ({category.__name__}, {filename}:{lineno})"
        for part in str(message).splitlines():
            note(f"warning: {part}{at}")
        others(message, category, filename, lineno, file, line)

    root, handler = logging.getLogger(), _Recorder(note)
    others, warnings.showwarning = warnings.showwarning, show
    root.addHandler(handler)
    try:
        yield
    except Exception:
        for line in traceback.format_exc().splitlines():
            note(line)
        raise
    finally:
        root.removeHandler(handler)
        # Unless somebody else has put theirs over it meanwhile.
        if warnings.showwarning is show:
            warnings.showwarning = others


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"prunekit: {line}", file=sys.stderr)


def _text(record: logging.LogRecord) -> str:
    ours = record.name.partition(".")[0] == "prunekit"
    return record.getMessage() if ours else f"{record.name}: {record.getMessage()}"


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(_text(record))


class _Recorder(logging.Handler):
    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == progress_logger.name:
            return  # has been noted
        for line in _text(record).splitlines():
            self.note(f"{record.levelname.lower()}: {line}")
        if record.levelno >= logging.WARNING and not self._is_heard(record):
            # What logging does where nobody listens, and we only write.
            logging.lastResort.handle(record)

    def _is_heard(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False
