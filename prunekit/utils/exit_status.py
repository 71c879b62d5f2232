"""The end of a command: its message and exit status."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prunekit.errors import Interrupted, PluginError, PrunekitError, RecipeError, WriteError
from prunekit.utils import launcher
from prunekit.utils.io import is_disk_failure, is_out_of_memory, write_error
from prunekit.utils.text import one_line

INTERRUPTED = 130


@contextmanager
def exit_on_error(debug: bool) -> Iterator[None]:
    """Within ``with``, report any exception in one line and exit; with ``debug`` also print the traceback."""
    try:
        yield
    except PrunekitError as error:
        same_on_all_ranks = isinstance(error, (RecipeError, PluginError, _Stopped))
        _fail(str(error), error.exit_status, debug, same_on_all_ranks)
    except (KeyboardInterrupt, EOFError):
        _fail("interrupted", INTERRUPTED, debug, same_on_all_ranks=True)
    except SystemExit as stop:
        # Typer turns Ctrl-C into a silent exit.
        if stop.code == INTERRUPTED:
            _fail("interrupted", INTERRUPTED, debug, same_on_all_ranks=True)
        raise
    except BrokenPipeError:
        # The reader of our output (head, less) has finished.
        sys.exit(0)
    except Exception as error:
        if is_disk_failure(error):
            _fail(str(write_error(error, error.filename or "a file")), WriteError.exit_status, debug)
        text = one_line(str(error)) or "no message"
        if is_out_of_memory(error):
            fix = "free memory, raise its limit (ulimit -v), or use a smaller batch_size or data.size"
            _fail(f"out of memory ({type(error).__name__}: {text}); {fix}", 3, debug)
        _fail(f"unexpected {type(error).__name__}: {text}; run again with --debug for the traceback", 3, debug)


@contextmanager
def suggest_resume(*command: object) -> Iterator[None]:
    """Within ``with``, let an interrupt name the command that resumes."""
    try:
        yield
    except Interrupted as error:
        raise _Stopped(f"interrupted; resume with: prunekit {shlex.join(map(str, command))}") from error


class _Stopped(PrunekitError):
    """A run was interrupted. (Typer catches a KeyboardInterrupt.)"""

    exit_status = INTERRUPTED


def _fail(message: str, status: int, debug: bool, same_on_all_ranks: bool = False) -> None:
    rank = launcher.process_index()
    name = f"prunekit, process {rank}" if rank else "prunekit"
    with suppress(BrokenPipeError):
        if debug:
            traceback.print_exc()
        for line in message.splitlines() if not (same_on_all_ranks and rank) else ():
            print(f"{name}: {_escape(line)}", file=sys.stderr)
    sys.exit(status)


def _escape(line: str) -> str:
    """Escape control characters, which a quoted untrusted file may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
