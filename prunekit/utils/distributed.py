"""Several processes that do one run together, as torchrun and accelerate start them: who they are, and what they tell
each other.

Process 0 leads: it alone has the run folder, writes and prints, and does what is no training. The others wait until it
names a stage that trains (:mod:`prunekit.pipeline.workers`). A single process is a group of one, at no cost.

Gradients go through the accelerator's own connections, words and waiting through connections of their own between the
processors: process 0 may measure and export for hours while the others wait, and a process that dies is noticed at
once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils.environment import get_int_from_env
from torch import Tensor

from prunekit.errors import TrainingError

# How long a process waits for the gradients of the others: it may be that process 0 looks at the validation set.
PATIENCE = timedelta(minutes=30)
# How long for a word: as long as any stage may take.
LONGEST = timedelta(days=30)
# Where launchers say how many processes they start.
_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]

_words: Any = None  # the connections for words; None where there is one process


class LostProcessError(TrainingError):
    """Another process of the run has died, or cannot be reached."""


def init() -> int:
    """Meet the other processes, where this one was started as one of several; its number, 0 for the one that leads.

    Raises:
        LostProcessError: the other processes cannot be reached.
    """
    global _words
    if get_int_from_env(_SIZES, 1) > 1 and _words is None:
        # Left to itself, accelerate takes processes without a GPU for as many runs of their own.
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        with _reaching():
            PartialState(cpu=on_cpu, timeout=PATIENCE)
            _words = dist.new_group(backend="gloo", timeout=LONGEST)
    return rank()


def world_size() -> int:
    """How many processes do the run."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if _started() else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@contextlib.contextmanager
def main_process_scope() -> Iterator[None]:
    """While process 0 does a command; in the end, whatever it is, the others are told that nothing more comes."""
    try:
        yield
    except LostProcessError:
        raise
    except BaseException:
        with contextlib.suppress(LostProcessError):
            send_command(None)
        raise
    else:
        send_command(None)


def send_command(word: str | None) -> None:
    """Say a word to those that wait for it in :func:`hear`; nothing happens where there are none."""
    _broadcast(word)


def receive_command() -> str | None:
    """Wait for a word of process 0."""
    return _broadcast(None)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Process 0 does this first, the others when it has: what it makes they find."""
    if not is_main_process():
        _meet()
    yield
    if is_main_process():
        _meet()


def all_reduce_mean_(row: Tensor) -> Tensor:
    """Make of a tensor, in place, the mean over all processes; the same bits in each of them."""
    if world_size() > 1:
        with _reaching():
            dist.all_reduce(row)
        row /= world_size()
    return row


def broadcast(row: Tensor) -> Tensor:
    """What process 0 has of this tensor, which has one axis."""
    if world_size() == 1:
        return row
    sent = row.cpu()
    with _reaching():
        # Bytes, since not every kind of number can be sent.
        dist.broadcast(sent.view(torch.uint8), src=0, group=_words)
    return sent.to(row.device)


def assert_identical(rows: Sequence[Tensor], what: str) -> None:
    """Hold the tensors of all processes against each other, bit by bit.

    Raises:
        TrainingError: they differ; ``what`` names them.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256(b"".join(row.detach().cpu().numpy().tobytes() for row in rows)).digest()
    mine = torch.frombuffer(bytearray(digest[:8]), dtype=torch.int64)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    with _reaching():
        dist.all_gather(found, mine, group=_words)
    others = [str(number) for number, one in enumerate(found) if not torch.equal(one, found[0])]
    if others:
        raise TrainingError(
            f"{what} differ between process 0 and {' and '.join(others)}; start all of them on machines of one kind "
            "and with the same versions, then go on with --resume"
        )


def _meet() -> None:
    if world_size() > 1:
        with _reaching():
            dist.barrier(group=_words)


def _broadcast(word: str | None) -> str | None:
    if world_size() == 1:
        return word
    words = [word]
    with _reaching():
        dist.broadcast_object_list(words, src=0, group=_words)
    return words[0]


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Say in a line that another process is gone; the libraries say it in as many words as there are of them."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if threading.current_thread() is threading.main_thread():
            # What started the processes ends those that are left; the run folder is to be left in order first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostProcessError(
            f"another of the {get_int_from_env(_SIZES, 1)} processes of this run has ended or cannot be reached "
            f"({why[:160]}); go on with --resume"
        ) from error
