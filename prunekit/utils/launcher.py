"""How torchrun and accelerate have started this process: alone, or as one of several. Without torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# What several processes do together; for all else one is enough.
TOGETHER = ("run", "slim", "finetune")


def process_index() -> int | None:
    """The number of this process, from 0; None where it is alone."""
    size, number = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return int(number) if size.isdecimal() and int(size) > 1 and number.isdecimal() else None


def begin(command: str = "") -> None:
    """Begin a command: where it is not for several processes, the first goes on as if it were alone, and the others end
    here."""
    number = process_index()
    if number is None or command in TOGETHER:
        return
    if number > 0:
        raise SystemExit(0)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@contextlib.contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Let this process print nothing, unless it is the first or alone."""
    if not process_index():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
