"""Being asked to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from prunekit.utils.signals import SIGNALS, defer_interrupts, sigterm_as_interrupt


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_deferred_and_the_second_is_not(number, capfd):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        signal.raise_signal(number)
        pytest.fail("the second one was held back too")
    assert handlers() == before
    assert "once more to stop at once" in capfd.readouterr().err


def test_what_nobody_has_heeded_is_raised_in_the_end():
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match="first"), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("what went wrong first")


def test_sigterm_is_a_ctrl_c():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def test_what_is_ignored_stays_so():
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupts() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, held)


def test_another_thread_gets_no_signals():
    found = []

    def work():
        with defer_interrupts() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_process_that_is_asked_in_the_middle_of_a_print():
    """A handler that printed would enter the stream a second time, which raises."""
    code = (
        "import signal, sys\nfrom prunekit.utils.signals import defer_interrupts\n"
        "with defer_interrupts() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested:\n"
        "        sys.stderr.write('x')\n"
        "    print('heard', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert out == b"heard\n" and b"reentrant" not in error
    assert process.returncode != 0 and b"KeyboardInterrupt" in error


def test_what_a_launcher_sends_on_is_no_second_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(KeyboardInterrupt), defer_interrupts() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        monkeypatch.setattr("prunekit.utils.signals._ECHO", 0.0)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError
