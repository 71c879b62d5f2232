"""Handling of Ctrl-C (SIGINT) and of SIGTERM, which clusters send before they kill a job."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from prunekit.utils import launcher

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# On Ctrl-C, torchrun's processes get a signal from the terminal and one from torchrun within this many seconds.
_ECHO_SECONDS = 2.0
_MESSAGE = b"\nprunekit: stopping after this step and saving a checkpoint; interrupt again to stop at once\n"


@dataclass
class DeferredInterrupt:
    requested: bool = False


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within ``with``, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    with _handle((signal.SIGTERM,), signal.default_int_handler):
        yield


@contextlib.contextmanager
def defer_interrupts() -> Iterator[DeferredInterrupt]:
    """Within ``with``, the first signal only sets ``requested``, and the second raises KeyboardInterrupt.

    After a first signal, the end of the block raises KeyboardInterrupt. Threads other than the main one get no signals,
    and ignored signals (nohup) stay ignored.
    """
    interrupt, first = DeferredInterrupt(), 0.0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if interrupt.requested:
            if launcher.process_index() is not None and time.monotonic() - first < _ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        interrupt.requested, first = True, time.monotonic()
        # Not print(): the handler may run within a print, and streams are not reentrant.
        if not launcher.process_index():
            with contextlib.suppress(OSError):
                os.write(2, _MESSAGE)

    with _handle(SIGNALS, handler):
        yield interrupt
    if interrupt.requested:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handle(signals: tuple[signal.Signals, ...], handler: object) -> Iterator[None]:
    old_handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                # None: installed outside of Python, and cannot be restored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    old_handlers[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old_handler in old_handlers.items():
            # Other code may have replaced it since.
            if signal.getsignal(number) is handler:
                signal.signal(number, old_handler)
