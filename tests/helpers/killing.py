"""Runs the command line repeatedly, each time in its own process, which is killed at a chosen moment.

As a program this file is a fork server: it imports what a run needs once and forks for each request. A request is a
line of JSON on stdin, the answer a line on stdout. The server itself never trains, since autograd cannot be forked.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# Calls that change the disk. Between two of them, a killed process leaves the same folder.
CALLS = ("fsync", "replace", "unlink", "truncate", "rmdir")

WARM = """matplotlib.pyplot onnxruntime onnxscript sklearn.datasets torch_pruning torch._dynamo fvcore.nn thop
prunekit.cli prunekit.pipeline.runner""".split()


class Launcher:
    """Client of the fork server."""

    def __init__(self):
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()

    def run(self, *arguments, **how):
        """Run ``prunekit ARGUMENTS``.

        Args:
            arguments: of the command line.
            how: at most one of ``call`` (killed before this call of CALLS, from 1), ``step`` (killed after this
                optimizer step), ``seconds`` (killed after this time), ``signals`` (raised after optimizer step ``at``)
                and ``raises`` (a stage, and the exception that its function raises).

        Returns:
            status (negative: the signal that ended it), out, err, and calls: those of CALLS that were made, each with
            the name of its file.
        """
        self._process.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], **how}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)
    if not os.environ.get("PRUNEKIT_SOAK"):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import pytest

        from helpers.small_run import skip_figures

        skip_figures(pytest.MonkeyPatch())
    assert threading.active_count() == 1
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            places = {name: Path(folder) / name for name in ("out", "err", "calls")}
            child = os.fork()
            if not child:
                _child(request, places)
            answer = {"status": _wait(child, request.get("seconds"))}
            answer |= {name: path.read_text() for name, path in places.items()}
            answer["calls"] = answer["calls"].splitlines()
            print(json.dumps(answer), flush=True)


def _wait(child: int, seconds: float | None) -> int:
    """Return the exit status of a process, which is killed after this many seconds."""
    end = time.monotonic() + seconds if seconds is not None else None
    while end is not None:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(ended)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(request: dict, places: dict[str, Path]) -> None:
    status = 99
    try:
        counts = os.open(places["calls"], os.O_RDWR | os.O_CREAT)
        for number, name in ((0, os.devnull), (1, places["out"]), (2, places["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", buffering=1) for n in range(3))  # noqa: SIM115
        _prepare(request, counts)
        from prunekit.cli import main

        sys.argv = ["prunekit", *request["arguments"]]
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _prepare(request: dict, counts: int) -> None:
    """Install what kills, interrupts or fails the process."""
    done = 0

    def counted(name):
        held = getattr(os, name)

        def call(*arguments, **named):
            nonlocal done
            done += 1
            os.write(counts, f"{name} {_name(name, arguments)}\n".encode())
            if done == request.get("call"):
                if name == "fsync":
                    _tear(arguments[0])
                os.kill(os.getpid(), signal.SIGKILL)
            return held(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))
    from prunekit import reporting
    from prunekit.pipeline import runner

    # It takes longer than the run.
    reporting.report = lambda *_: None
    if "step" in request or "at" in request:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        steps = 0

        def stepped(*_):
            nonlocal steps
            steps += 1
            if steps == request.get("step"):
                os.kill(os.getpid(), signal.SIGKILL)
            if steps == request.get("at"):
                for number in request["signals"]:
                    signal.raise_signal(number)

        register_optimizer_step_post_hook(stepped)
    if "raises" in request:
        import builtins

        stage, kind, text = request["raises"]

        def broken(*_):
            raise getattr(builtins, kind)(text)

        runner.STAGE_FUNCTIONS[stage] = broken


def _name(call: str, arguments: tuple) -> str:
    """Return the file of a call with its folder; of two files the new one."""
    path = os.readlink(f"/proc/self/fd/{arguments[0]}") if call == "fsync" else arguments[-1]
    return "/".join(Path(path).parts[-2:])


def _tear(handle: int) -> None:
    """Truncate a file that is being written."""
    path = Path(os.readlink(f"/proc/self/fd/{handle}"))
    if path.is_file() and (size := path.stat().st_size) > 3:
        with path.open("r+b") as file:
            file.truncate(size - 3)


if __name__ == "__main__":
    _serve()
