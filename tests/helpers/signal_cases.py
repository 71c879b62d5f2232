"""Checks that raise signals, each for a process of its own: libraries in a test runner may handle signals, too."""

import signal
import threading

import pytest

from prunekit.utils.signals import SIGNALS, defer_interrupts, sigterm_as_interrupt


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def unhandled_interrupt_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="first"), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the first error")


def sigterm_raises_keyboard_interrupt():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def ignored_signals_stay_ignored():
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupts() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, held)


def other_threads_get_no_signals():
    found = []

    def work():
        with defer_interrupts() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def signal_repeated_by_the_launcher_counts_once():
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("prunekit.utils.signals._ECHO_SECONDS", 1e9)
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        monkeypatch.setattr("prunekit.utils.signals._ECHO_SECONDS", 0.0)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError
