"""Whether torchrun or accelerate started this process alone or as one of several. Does not import torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

DISTRIBUTED_COMMANDS = ("run", "slim", "finetune")


def process_index() -> int | None:
    """Return the rank of this process, or None if it is the only one."""
    size, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return int(rank) if size.isdecimal() and int(size) > 1 and rank.isdecimal() else None


def exit_other_ranks(command: str = "") -> None:
    """If a command is not distributed, let process 0 continue as the only one and end the others."""
    rank = process_index()
    if rank is None or command in DISTRIBUTED_COMMANDS:
        return
    if rank > 0:
        raise SystemExit(0)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@contextlib.contextmanager
def silence_other_ranks() -> Iterator[None]:
    """Within ``with``, only process 0 prints."""
    if not process_index():
        yield
        return
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        yield
