import os
import signal
import subprocess
import sys
import threading

import pytest

from prunekit.utils.signals import SIGNALS, defer_interrupts, sigterm_as_interrupt


@pytest.fixture(autouse=True)
def _python_handlers():
    """Whoever started the tests may ignore these signals, or leave them to the system, which ends the process."""
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


TWO_SIGNALS = """
import signal, sys
from prunekit.utils.signals import SIGNALS, defer_interrupts
before = [signal.getsignal(number) for number in SIGNALS]
try:
    with defer_interrupts() as stop:
        assert not stop.requested
        signal.raise_signal(int(sys.argv[1]))
        assert stop.requested
        signal.raise_signal(int(sys.argv[1]))
        sys.exit("the second signal was deferred too")
except KeyboardInterrupt:
    assert [signal.getsignal(number) for number in SIGNALS] == before
    print("interrupted")
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_deferred_and_the_second_is_not(number):
    command = [sys.executable, "-c", TWO_SIGNALS, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert "interrupt again to stop at once" in done.stderr


def test_unhandled_interrupt_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="first"), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the first error")


def test_sigterm_raises_keyboard_interrupt():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def test_ignored_signals_stay_ignored():
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupts() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, held)


def test_other_threads_get_no_signals():
    found = []

    def work():
        with defer_interrupts() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_signal_during_a_print():
    code = (
        "import signal, sys\nfrom prunekit.utils.signals import defer_interrupts\n"
        "with defer_interrupts() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested:\n"
        "        sys.stderr.write('x')\n"
        "    print('stopped', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=600)
    assert out == b"stopped\n" and b"reentrant" not in error
    assert process.returncode != 0 and b"KeyboardInterrupt" in error


def test_signal_repeated_by_the_launcher_counts_once(monkeypatch):
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
