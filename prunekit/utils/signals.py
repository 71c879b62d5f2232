"""Being asked to stop: by Ctrl-C, or by the SIGTERM that clusters send before they kill."""

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
_ECHO = 2.0  # seconds within which a second signal may be the launcher's copy of the first
_HEARD = b"\nprunekit: stopping behind this step, its state is saved then; once more to stop at once\n"


@dataclass
class DeferredInterrupt:
    """Whether somebody has asked."""

    requested: bool = False


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within ``with``, SIGTERM does what Ctrl-C does: it raises KeyboardInterrupt."""
    with _handled((signal.SIGTERM,), _interrupt):
        yield


@contextlib.contextmanager
def defer_interrupts() -> Iterator[DeferredInterrupt]:
    """Within ``with``, the first signal only makes the :class:`Stop` say so, and the second raises KeyboardInterrupt.
    (On Ctrl-C, what torchrun has started gets one from the terminal and one from torchrun: there they count as one.)

    What has been asked for and not been done by the end raises there. A thread that is not the main one gets no
    signals, and a signal that is ignored, as nohup does it, stays so.
    """
    stop, first = DeferredInterrupt(), 0.0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.requested:
            if launcher.process_index() is not None and time.monotonic() - first < _ECHO:
                return
            raise KeyboardInterrupt
        stop.requested, first = True, time.monotonic()
        # No print: a handler may come in the middle of one, and a stream cannot be entered twice.
        if not launcher.process_index():
            with contextlib.suppress(OSError):
                os.write(2, _HEARD)

    with _handled(SIGNALS, handler):
        yield stop
    if stop.requested:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: object) -> Iterator[None]:
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                # None: set by something that is not Python, and cannot be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, held in before.items():
            # Unless somebody has set another meanwhile.
            if signal.getsignal(number) is handler:
                signal.signal(number, held)
