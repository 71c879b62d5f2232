"""Communication between the processes of one run, as started by torchrun or accelerate.

Process 0 writes the run folder, prints, and does everything but training. The others wait until it sends them a stage
to train (:mod:`prunekit.pipeline.workers`). Commands and barriers use a gloo group of their own with a long timeout,
because process 0 may evaluate and export for hours while the others wait.
"""

from __future__ import annotations

import atexit
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

# Process 0 may evaluate the validation set while the others wait for its gradients.
GRADIENT_TIMEOUT = timedelta(minutes=30)
COMMAND_TIMEOUT = timedelta(days=30)
_WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]

_command_group: Any = None


class LostProcessError(TrainingError):
    """Another process of the run has ended or cannot be reached."""


def init() -> int:
    """Connect to the other processes, if any, and return this one's rank."""
    global _command_group
    if get_int_from_env(_WORLD_SIZE_VARIABLES, 1) > 1 and _command_group is None:
        # By default, accelerate treats processes without a GPU as separate runs.
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        with _detect_lost_process():
            PartialState(cpu=on_cpu, timeout=GRADIENT_TIMEOUT)
            _command_group = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        # Threads of gloo that still run when the interpreter's static objects are destroyed abort the process.
        atexit.register(_close)
    return rank()


def _close() -> None:
    if _is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if _is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if _is_initialized() else 0


def is_main_process() -> bool:
    return rank() == 0


@contextlib.contextmanager
def main_process_scope() -> Iterator[None]:
    """Within ``with``, process 0 runs a command; at the end, also after an error, the other processes stop waiting."""
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


def send_command(command: str | None) -> str | None:
    """Send a command to the processes that wait in :func:`receive_command`."""
    commands = [command]
    if world_size() > 1:
        with _detect_lost_process():
            dist.broadcast_object_list(commands, src=0, group=_command_group)
    return commands[0]


def receive_command() -> str | None:
    """Wait for a command of process 0."""
    return send_command(None)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in process 0 first, then in the others, which find the files that it made."""
    if not is_main_process():
        _barrier()
    yield
    if is_main_process():
        _barrier()


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Replace a tensor in place by its mean over all processes; bitwise equal in each of them."""
    if world_size() > 1:
        with _detect_lost_process():
            dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Return process 0's value of a one-dimensional tensor."""
    if world_size() == 1:
        return tensor
    on_cpu = tensor.cpu()
    with _detect_lost_process():
        # As bytes, since gloo does not support every dtype.
        dist.broadcast(on_cpu.view(torch.uint8), src=0, group=_command_group)
    return on_cpu.to(tensor.device)


def assert_identical(tensors: Sequence[Tensor], name: str) -> None:
    """Raise TrainingError if tensors, called ``name`` in the message, are not bitwise equal in all processes."""
    if world_size() == 1:
        return
    digest = hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)).digest()
    own = torch.frombuffer(bytearray(digest[:8]), dtype=torch.int64)
    digests = [torch.empty_like(own) for _ in range(world_size())]
    with _detect_lost_process():
        dist.all_gather(digests, own, group=_command_group)
    others = [str(number) for number, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
    if others:
        raise TrainingError(
            f"{name} differ between process 0 and {' and '.join(others)}; start all on the same kind of machine "
            "with the same versions, then continue with --resume"
        )


def _barrier() -> None:
    if world_size() > 1:
        with _detect_lost_process():
            dist.barrier(group=_command_group)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def _detect_lost_process() -> Iterator[None]:
    """Within ``with``, convert the libraries' many errors to a LostProcessError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if threading.current_thread() is threading.main_thread():
            # The launcher terminates the remaining processes; update the run folder first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostProcessError(
            f"another of the {get_int_from_env(_WORLD_SIZE_VARIABLES, 1)} processes of this run has ended or cannot be "
            f"reached ({reason[:160]}); continue with --resume"
        ) from error
