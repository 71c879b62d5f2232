import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.utils.signals import SIGNALS

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


@pytest.mark.parametrize(
    "case",
    [
        "unhandled_interrupt_is_raised_at_the_end",
        "sigterm_raises_keyboard_interrupt",
        "ignored_signals_stay_ignored",
        "other_threads_get_no_signals",
        "signal_repeated_by_the_launcher_counts_once",
    ],
)
def test_signals_in_a_process(case):
    code = (
        f"import signal_cases, signal; signal.signal(signal.SIGINT, signal.default_int_handler); signal_cases.{case}()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "helpers")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


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
