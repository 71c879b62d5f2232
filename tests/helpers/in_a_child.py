"""Run a function in a child process with limits on memory and time."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def in_a_child(work: Callable[[], None], memory: int, seconds: int) -> int:
    """Return by how many bytes the peak of resident memory grew.

    Args:
        work: runs in a fork.
        memory: additional bytes of address space.
        seconds: CPU time.

    Raises:
        AssertionError: it raised (the traceback is on stderr), exceeded a limit, or was killed.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
            used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
            resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 1))
            before = _resident()
            work()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writer, str(max(0, peak - before)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writer)
    try:
        output = b"".join(iter(lambda: os.read(reader, 4096), b""))
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
    if os.WIFSIGNALED(status):
        raise AssertionError(f"killed by {signal.Signals(os.WTERMSIG(status)).name}: too much time or memory")
    assert os.WEXITSTATUS(status) == 0, "it raised, see above"
    return int(output)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
