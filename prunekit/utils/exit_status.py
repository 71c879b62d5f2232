"""How a command ends: what is said then, and with which exit status."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from prunekit.errors import Interrupted, PluginError, PrunekitError, RecipeError, WriteError
from prunekit.utils import launcher

INTERRUPTED = 130


@contextmanager
def exit_on_error(debug: bool) -> Iterator[None]:
    """Within ``with`` a command is done; whatever it raises is said in a line, and a SystemExit.

    Args:
        debug: show its traceback, too.
    """
    try:
        yield
    except PrunekitError as error:
        _fail(str(error), error.exit_status, debug, alike=isinstance(error, (RecipeError, PluginError, _Stopped)))
    except (KeyboardInterrupt, EOFError):
        _fail("interrupted", INTERRUPTED, debug, alike=True)
    except SystemExit as stop:
        # Typer turns Ctrl-C into an exit without a word.
        if stop.code == INTERRUPTED:
            _fail("interrupted", INTERRUPTED, debug, alike=True)
        raise
    except BrokenPipeError:
        # What reads our output has seen enough.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        # Not at the top: it needs numpy, which help does without.
        from prunekit.utils.io import is_disk_failure, write_error

        if is_disk_failure(error):
            _fail(str(write_error(error, error.filename or "a file")), WriteError.exit_status, debug)
        text = " ".join(str(error).split()) or "no message"
        _fail(f"unexpected {type(error).__name__}: {text}; run again with --debug to see where", 3, debug)


@contextmanager
def suggest_resume(*command: object) -> Iterator[None]:
    """Say by which command what is done within ``with`` goes on, where it is interrupted."""
    try:
        yield
    except Interrupted as stop:
        raise _Stopped(f"interrupted; resume with: prunekit {shlex.join(map(str, command))}") from stop


class _Stopped(PrunekitError):
    """A run was interrupted, and here is how it goes on. (Typer keeps a KeyboardInterrupt to itself.)"""

    exit_status = INTERRUPTED


def _fail(message: str, status: int, debug: bool, alike: bool = False) -> None:
    """End; ``alike``: where there are several processes the others end with the same, and the first says it."""
    if debug:
        traceback.print_exc()
    number = launcher.process_index()
    name = f"prunekit, process {number}" if number else "prunekit"
    for line in message.splitlines() if not (alike and number) else ():
        print(f"{name}: {_harmless(line)}", file=sys.stderr)
    sys.exit(status)


def _harmless(line: str) -> str:
    """A line that a file from anywhere may be quoted in: what a terminal would obey is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
